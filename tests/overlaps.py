"""Records refreshes in the database itself, whoever does them: no key may be refreshed at two places at once."""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg import AsyncConnection

# Each from its first write, after it got the key's lock, to before it gives it back.
RECORD_REFRESHES: LiteralString = """
    CREATE TABLE refreshed (n bigint GENERATED ALWAYS AS IDENTITY, view_id int, tenant text, during tstzrange);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO public.refreshed (view_id, tenant, during)
        SELECT NEW.view_id, NEW.tenant, tstzrange(began, clock_timestamp())
        FROM (SELECT nullif(current_setting('test.began', true), '')::timestamptz AS began) b WHERE began IS NOT NULL;
        RETURN NULL;
    END $$;
    CREATE FUNCTION begin() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM set_config('test.began', clock_timestamp()::text, true)
        WHERE coalesce(current_setting('test.began', true), '') = '';
        RETURN NULL;
    END $$;
    CREATE TRIGGER begin BEFORE INSERT OR UPDATE OR DELETE ON dashboard.mv_realtime_revenue
        FOR EACH STATEMENT EXECUTE FUNCTION begin();
    CREATE TRIGGER record AFTER INSERT OR UPDATE ON listener.refresh_state FOR EACH ROW
        WHEN (NEW.tenant <> '') EXECUTE FUNCTION record();
"""
# Versions that went backwards: what was shown once is not taken back.
RECORD_RETURNS: LiteralString = """
    CREATE TABLE went_back (view_id int, tenant text, was bigint, became bigint);
    CREATE FUNCTION went_back() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
        INSERT INTO public.went_back VALUES (NEW.view_id, NEW.tenant, OLD.refreshed_version, NEW.refreshed_version);
        RETURN NULL;
    END $$;
    CREATE TRIGGER went_back AFTER UPDATE ON listener.refresh_state FOR EACH ROW
        WHEN (NEW.refreshed_version < OLD.refreshed_version) EXECUTE FUNCTION went_back();
"""


async def record_refreshes(superuser: AsyncConnection[Any]) -> None:
    """From now on; the refreshes of mv_realtime_revenue, and every version."""
    await superuser.execute(RECORD_REFRESHES)
    await superuser.execute(RECORD_RETURNS)


async def wrong_refreshes(superuser: AsyncConnection[Any]) -> list[Any]:
    """Pairs of refreshes of one key that overlapped, and versions that went backwards."""
    at_once = await superuser.execute(
        "SELECT a, b FROM refreshed a JOIN refreshed b USING (view_id, tenant) WHERE a.n < b.n AND a.during && b.during"
    )
    went_back = await superuser.execute("SELECT w FROM went_back w")
    return await at_once.fetchall() + await went_back.fetchall()
