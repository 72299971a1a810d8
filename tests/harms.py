"""What somebody may do to a set-up of the shop with the views `sales` and `balance`, and what the doctor says of it."""

from __future__ import annotations

from typing import LiteralString, NamedTuple


class Harm(NamedTuple):
    """What somebody does, and what the doctor says of it."""

    statement: LiteralString
    check: str
    level: str
    object: str
    says: str


CAPTURE = {
    "a trigger dropped": Harm(
        "DROP TRIGGER listener_1_insert ON shop.orders", "capture", "error", "shop.orders", "triggers are missing"
    ),
    "a trigger disabled": Harm(
        "ALTER TABLE shop.orders DISABLE TRIGGER listener_1_update", "capture", "error", "shop.orders", "are disabled"
    ),
    "a trigger no longer ALWAYS": Harm(
        "ALTER TABLE shop.payments DISABLE TRIGGER USER; ALTER TABLE shop.payments ENABLE TRIGGER USER",
        "capture", "error", "shop.payments", "are not enabled ALWAYS",
    ),
    "a trigger that calls another function": Harm(
        """
        CREATE OR REPLACE TRIGGER listener_1_delete AFTER DELETE ON shop.orders REFERENCING OLD TABLE AS old_rows
            FOR EACH STATEMENT EXECUTE FUNCTION listener.capture_1_truncate();
        ALTER TABLE shop.orders ENABLE ALWAYS TRIGGER listener_1_delete
        """,
        "capture", "error", "shop.orders", "are calling another function",
    ),
    "a capture function replaced": Harm(
        """
        CREATE OR REPLACE FUNCTION listener.capture_1_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END'
        """,
        "capture", "error", "shop.orders", "functions are not those that were generated",
    ),
    "capture paused": Harm(
        "SELECT listener.pause(NULL, true)", "capture", "warning", "all sources", "capture is paused"
    ),
    "the owner no member of the sources' owner": Harm(
        "REVOKE shop_owner FROM listener_owner", "capture", "warning", "shop.orders", "belongs to shop_owner, of which"
    ),
    "a source that nobody reads": Harm(
        "SELECT listener.add_source('shop.prices')", "capture", "warning", "shop.prices", "no view reads it"
    ),
    "a tenant that may be NULL": Harm(
        "ALTER TABLE shop.orders ALTER COLUMN tenant_id DROP NOT NULL",
        "capture", "warning", "shop.orders", "tenant column tenant_id may be NULL",
    ),
}  # fmt: skip
RIGHTS = {
    "the schema's USAGE": Harm(
        "REVOKE USAGE ON SCHEMA listener FROM listener_service",
        "rights", "error", "schema listener", "listener_service lacks USAGE",
    ),
    "a function of its own": Harm(
        "REVOKE EXECUTE ON FUNCTION listener.refresh(text, text) FROM listener_service",
        "rights", "error", "listener.refresh(text,text)", "lacks EXECUTE",
    ),
    "a state table": Harm(
        "REVOKE INSERT ON listener.dirty_key FROM listener_service",
        "rights", "error", "listener.dirty_key", "lacks INSERT",
    ),
    "a definition": Harm(
        "REVOKE SELECT ON listener.definition_1 FROM listener_service",
        "rights", "error", "listener.definition_1", "lacks SELECT",
    ),
    "a difference": Harm(
        "ALTER FUNCTION listener_private.difference_1(text) SECURITY INVOKER",
        "roles", "error", "listener_private.difference_1(text)", "somebody altered it",
    ),
    "a source": Harm(
        "REVOKE SELECT ON shop.orders FROM listener_service", "rights", "error", "shop.orders", "lacks SELECT"
    ),
    "a column of a source": Harm(
        "REVOKE SELECT ON shop.orders FROM listener_service;"
        "GRANT SELECT (tenant_id) ON shop.orders TO listener_service",
        "rights", "error", "shop.orders", "lacks SELECT",
    ),
    "a source's schema": Harm(
        "REVOKE USAGE ON SCHEMA shop FROM listener_service", "rights", "warning", "schema shop", "lacks USAGE"
    ),
    "the target": Harm(
        "REVOKE UPDATE ON public.sales FROM listener_service", "view", "error", "sales", "may not write the target"
    ),
    "the targets' schema, for the owner": Harm(
        "REVOKE CREATE ON SCHEMA public FROM listener_owner",
        "rights", "warning", "schema public", "listener_owner lacks CREATE",
    ),
    "the statistics": Harm(
        "REVOKE pg_read_all_stats FROM listener_service",
        "rights", "warning", "role pg_read_all_stats", "listener_service is no member",
    ),
    "the owner's membership": Harm(
        "REVOKE listener_compute FROM listener_owner",
        "rights", "warning", "role listener_compute", "listener_owner is no member",
    ),
    "a function given away": Harm(
        "ALTER FUNCTION listener.drain() OWNER TO shop_app",
        "roles", "error", "listener.drain()", "it belongs to shop_app",
    ),
    "a capture function given away": Harm(
        "ALTER FUNCTION listener.capture_1_insert() OWNER TO shop_app",
        "roles", "error", "listener.capture_1_insert()", "belongs to shop_app",
    ),
}  # fmt: skip
TOO_MUCH = {
    "INSERT on a source": Harm(
        "GRANT INSERT ON shop.orders TO listener_service", "rights", "warning", "shop.orders", "may write it (INSERT)"
    ),
    "UPDATE of a column": Harm(
        "GRANT UPDATE (product) ON shop.orders TO listener_service",
        "rights", "warning", "shop.orders", "may write it (UPDATE (product))",
    ),
    "TRUNCATE by PUBLIC": Harm(
        "GRANT TRUNCATE ON shop.orders TO PUBLIC",
        "rights", "warning", "shop.orders", "may write it (TRUNCATE through PUBLIC)",
    ),
    "DELETE by a role": Harm(
        "GRANT DELETE ON shop.payments TO shop_writers; GRANT shop_writers TO listener_service",
        "rights", "warning", "shop.payments", "may write it (DELETE through shop_writers)",
    ),
    "CREATE in the schema listener": Harm(
        "GRANT CREATE ON SCHEMA listener TO listener_service", "rights", "error", "schema listener", "may create in it"
    ),
    "CREATE in a source's schema": Harm(
        "GRANT CREATE ON SCHEMA shop TO PUBLIC", "rights", "warning", "schema shop", "may create in it through PUBLIC"
    ),
    "SUPERUSER": Harm(
        "ALTER ROLE listener_service SUPERUSER", "roles", "error", "listener_service", "it is a superuser"
    ),
    "BYPASSRLS": Harm(
        "ALTER ROLE listener_service BYPASSRLS", "roles", "error", "listener_service", "it has BYPASSRLS"
    ),
    "CREATEROLE": Harm(
        "ALTER ROLE listener_service CREATEROLE", "roles", "warning", "listener_service", "may make roles"
    ),
    "REPLICATION": Harm(
        "ALTER ROLE listener_service REPLICATION", "roles", "warning", "listener_service", "may replicate"
    ),
    "the owner's role": Harm(
        "REVOKE listener_service, listener_compute FROM listener_owner; GRANT listener_owner TO listener_service",
        "roles", "error", "listener_service", "it is a member of listener_owner",
    ),
    "the sources' owner": Harm(
        "GRANT shop_owner TO listener_service", "roles", "error", "listener_service", "member of shop_owner, which owns"
    ),
    "a table of its own": Harm(
        "CREATE TABLE public.mine (); ALTER TABLE public.mine OWNER TO listener_service",
        "roles", "warning", "public.mine", "it belongs to listener_service",
    ),
    "a table of ours for everybody": Harm(
        "GRANT SELECT ON listener.dirty_key TO PUBLIC",
        "rights", "error", "listener.dirty_key", "everybody (PUBLIC) has rights",
    ),
    "a function of ours for everybody": Harm(
        "GRANT EXECUTE ON FUNCTION listener.purge(interval, bigint) TO PUBLIC",
        "rights", "error", "listener.purge(interval,bigint)", "everybody (PUBLIC) has rights",
    ),
    "the schema for the application": Harm(
        "GRANT USAGE ON SCHEMA listener TO shop_app", "rights", "warning", "schema listener", "shop_app, which writes"
    ),
}  # fmt: skip
ROW_SECURITY = {
    "no longer forced": Harm(
        "ALTER TABLE shop.orders NO FORCE ROW LEVEL SECURITY",
        "view", "error", "balance, sales", "not enabled and forced on shop.orders",
    ),
    "no policy left": Harm(
        "DROP POLICY tenant ON shop.orders", "row security", "error", "shop.orders", "no policy lets listener_service"
    ),
    "a policy for everybody": Harm(
        "CREATE POLICY all_of_it ON shop.orders USING (true)",
        "row security", "error", "shop.orders", "its policy all_of_it shows listener_service every tenant's rows",
    ),
    "a policy for the service": Harm(
        "CREATE POLICY all_of_it ON shop.payments FOR SELECT TO listener_service USING (true)",
        "row security", "error", "shop.payments", "its policy all_of_it shows listener_service every tenant's rows",
    ),
    "a policy that reads another setting": Harm(
        "ALTER POLICY tenant ON shop.orders USING (tenant_id = current_setting('shop.tenant')::uuid)",
        "row security", "warning", "shop.orders", "none of its policies reads app.current_tenant_id",
    ),
    "a target for everybody": Harm(
        "GRANT SELECT ON public.sales TO PUBLIC", "row security", "warning", "public.sales", "everybody may read it"
    ),
    "a target's readers see all": Harm(
        "CREATE POLICY all_of_it ON public.balance FOR SELECT TO shop_app USING (true)",
        "row security", "warning", "public.balance", "its policy all_of_it shows its readers every tenant's rows",
    ),
    "a target's row-level security": Harm(
        "ALTER TABLE public.balance DISABLE ROW LEVEL SECURITY",
        "view", "error", "balance", "not enabled and forced on the target public.balance",
    ),
    "a target's unique index": Harm(
        "DROP INDEX public.sales_tenant_id_product_idx", "view", "error", "sales", "the unique index of the target"
    ),
}  # fmt: skip
SERVER = {
    "no autovacuum for the log": Harm(
        "ALTER TABLE listener.change_log SET (autovacuum_enabled = false)",
        "server", "warning", "listener.change_log", "autovacuum is switched off",
    ),
    "a role with too few connections": Harm(
        "ALTER ROLE listener_service CONNECTION LIMIT 4",
        "server", "warning", "listener_service", "connection limit is 4, and a replica needs up to 8",
    ),
}  # fmt: skip
SCOPE = {
    "the tenants' index": Harm(
        "DROP INDEX shop.orders_tenant_id_idx",
        "scope",
        "warning",
        "shop.orders",
        "sales reads it whole for each tenant",
    ),
}
HARMS = CAPTURE | RIGHTS | TOO_MUCH | ROW_SECURITY | SERVER | SCOPE
