-- The doorbell and its lease: when writers notify. listener/doorbell.py has the protocol.

-- set_notify(mode): whether capture notifies: 'when_idle' (unless somebody polls), 'always', 'never' (the service polls
-- alone); NULL: when_idle, or never where max_prepared_transactions is above 0. Raises LSN02 for anything else.
CREATE OR REPLACE FUNCTION listener.set_notify(mode text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    IF mode NOT IN ('when_idle', 'always', 'never') THEN
        RAISE EXCEPTION 'notify must be when_idle, always or never, not %', pg_catalog.quote_literal(mode)
            USING ERRCODE = 'LSN02';
    END IF;
    UPDATE listener.installation SET notify = mode;
    PERFORM listener.generate_capture(s.id) FROM listener.source s
    WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = s.relid);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- set_notify_names(names): whether a notification names the table and the tenant. false: it says only that something
-- was written, since each role that can connect to the database can LISTEN.
CREATE OR REPLACE FUNCTION listener.set_notify_names(names boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
BEGIN
    IF names IS NULL THEN
        RAISE EXCEPTION 'names must be true or false' USING ERRCODE = 'LSN02';
    END IF;
    UPDATE listener.installation SET notify_names = names;
    PERFORM listener.generate_capture(s.id) FROM listener.source s
    WHERE EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.oid = s.relid);
    PERFORM pg_catalog.set_config('role', previous_role, true);
END
$function$;

-- hold_lease(): takes or extends the doorbell's lease: for the next half second writers need not notify.
CREATE OR REPLACE FUNCTION listener.hold_lease() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT setval('listener.doorbell', (date_part('epoch', clock_timestamp()) * 1000 + 500)::bigint)
$function$;

-- end_lease(): gives the lease up: from now on writers notify.
CREATE OR REPLACE FUNCTION listener.end_lease() RETURNS void
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT setval('listener.doorbell', 0)
$function$;

-- take_mark(): a transaction id assigned after the lease ended, in a transaction of its own after end_lease(), because
-- setval() takes its transaction's id before it changes the sequence. Every writer that saw the lease had its id
-- before it looked, so it is below the mark; is_past(mark) says when they all have ended.
-- The snapshot's xmax would not do: ids at and above it may have been given out already.
CREATE OR REPLACE FUNCTION listener.take_mark() RETURNS xid8
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF pg_current_xact_id_if_assigned() IS NOT NULL THEN
        RAISE EXCEPTION 'listener.take_mark() needs a transaction of its own' USING ERRCODE = 'LSN05';
    END IF;
    RETURN pg_current_xact_id();
END
$function$;

-- is_past(mark): whether every transaction below the mark has ended. A drain that begins after that, and is not busy,
-- sees whatever they wrote.
CREATE OR REPLACE FUNCTION listener.is_past(mark xid8) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT pg_snapshot_xmin(pg_current_snapshot()) > mark
$function$;

-- lease_is_wrong(): whether the lease reaches further than anybody may take it: the server's clock stepped back, and its
-- holder is gone. Writers cannot tell and do not notify; so whoever sweeps ends it, as it ends its own.
CREATE OR REPLACE FUNCTION listener.lease_is_wrong() RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(pg_sequence_last_value('listener.doorbell'::regclass)
                    > date_part('epoch', clock_timestamp()) * 1000 + 1000, false)
$function$;

-- must_poll(): whether capture never notifies, so that whoever drains has to look by itself.
CREATE OR REPLACE FUNCTION listener.must_poll() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(i.notify = 'never', current_setting('max_prepared_transactions') <> '0')
    FROM listener.installation i
$function$;
