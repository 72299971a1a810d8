-- Failures, backoff, dead letters.

-- record_failure(...): called in a transaction of its own after a refresh failed, since the refresh took its record
-- with it when it was rolled back. Backs off exponentially from `base` to `cap`, with jitter, so that keys which failed
-- together do not return together. From the attempt number `attempts` on, a dead letter is open for the key and it is
-- retried every `slow` only. One open letter per key: later failures update it.
-- Where somebody else is refreshing the key, what comes of that counts: then nothing is recorded, failures is 0, and the
-- key may be tried again after `base`.
CREATE OR REPLACE FUNCTION listener.record_failure(
    view_id integer, tenant text, correlation_id text, error_type text, state text, exception_class text,
    message text, traceback text, worker text, attempts integer, base interval, cap interval, slow interval,
    OUT failures integer, OUT retry_in double precision, OUT letter_id uuid)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    now_at timestamptz := clock_timestamp();
    wait interval;
    known record;
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(record_failure.view_id, record_failure.tenant)) THEN
        failures := 0;
        retry_in := extract(epoch FROM base);
        RETURN;
    END IF;
    SELECT s.ctid AS at, s.failures, s.refreshed_version INTO known FROM listener.refresh_state s
    WHERE s.view_id = record_failure.view_id AND s.tenant = record_failure.tenant
    ORDER BY s.refreshed_at DESC NULLS LAST LIMIT 1;
    failures := coalesce(known.failures, 0) + 1;
    wait := CASE WHEN failures >= attempts THEN slow
                 ELSE least(cap, base * power(2, least(failures - 1, 30))) END * (0.75 + random() * 0.5);
    retry_in := extract(epoch FROM wait);
    IF known.at IS NULL THEN
        -- Nothing is kept of a view that was dropped meanwhile.
        INSERT INTO listener.refresh_state
            (view_id, tenant, refreshed_version, failures, failed_at, retry_at, last_error)
        SELECT v.id, record_failure.tenant, -1, failures, now_at, now_at + wait, record_failure.message
        FROM listener.managed_view v WHERE v.id = record_failure.view_id;
    ELSE
        UPDATE listener.refresh_state r
        SET failures = record_failure.failures, failed_at = now_at, retry_at = now_at + wait,
            last_error = record_failure.message
        WHERE r.ctid = known.at;
    END IF;
    IF failures >= attempts THEN
        INSERT INTO listener.dead_letter AS d
            (view_id, view_name, tenant, error_type, sqlstate, exception_class, error_message, traceback, worker,
             retry_count, correlation_id, arguments, app_correlation_id)
        SELECT record_failure.view_id, v.name, record_failure.tenant, record_failure.error_type, state,
               record_failure.exception_class, message, record_failure.traceback, record_failure.worker, failures,
               coalesce(record_failure.correlation_id, gen_random_uuid()::text),
               jsonb_build_object('view', v.name, 'tenant_id', record_failure.tenant),
               -- The newest id that the application gave: it may have given none for later changes.
               (SELECT k.app_correlation_id FROM listener.dirty_key k
                WHERE k.view_id = record_failure.view_id AND k.tenant = record_failure.tenant
                  AND k.version > coalesce(known.refreshed_version, -1) AND k.app_correlation_id IS NOT NULL
                ORDER BY k.version DESC LIMIT 1)
        FROM listener.managed_view v WHERE v.id = record_failure.view_id
        ON CONFLICT (view_id, tenant) WHERE status = 'open' AND view_id IS NOT NULL AND tenant IS NOT NULL
        DO UPDATE SET retry_count = excluded.retry_count, error_type = excluded.error_type,
            sqlstate = excluded.sqlstate, exception_class = excluded.exception_class,
            error_message = excluded.error_message, traceback = excluded.traceback, worker = excluded.worker,
            correlation_id = excluded.correlation_id, app_correlation_id = excluded.app_correlation_id,
            failed_at = now_at
        RETURNING d.id INTO letter_id;
    END IF;
END
$function$;

-- record_refusal(...): a dead letter for a call that named no valid key; there is nothing to retry.
CREATE OR REPLACE FUNCTION listener.record_refusal(
    view_name text, tenant text, message text, correlation_id text, worker text) RETURNS uuid
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    INSERT INTO listener.dead_letter
        (view_name, tenant, error_type, exception_class, error_message, correlation_id, worker, arguments)
    VALUES (left(view_name, 200), left(tenant, 200), 'validation_error', 'ValidationError', message,
            coalesce(correlation_id, gen_random_uuid()::text), worker,
            jsonb_build_object('view', left(view_name, 200), 'tenant_id', left(tenant, 200)))
    RETURNING id
$function$;

-- discard_letter(id): closes a letter without a retry; true where it was open.
CREATE OR REPLACE FUNCTION listener.discard_letter(letter_id uuid) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
    WITH closed AS (
        UPDATE listener.dead_letter d SET status = 'discarded', closed_at = clock_timestamp()
        WHERE d.id = letter_id AND d.status = 'open' RETURNING 1)
    SELECT EXISTS (SELECT FROM closed)
$function$;

-- worker_failed_jobs: the dead letters in the columns that job tables of workers have.
CREATE OR REPLACE VIEW listener.worker_failed_jobs AS
SELECT d.id, d.id::text AS task_id, 'listener.refresh'::text AS task_name, 'listener'::text AS queue, d.worker,
       jsonb_build_array(d.view_name, d.tenant) AS task_args, d.arguments AS task_kwargs, d.tenant AS tenant_id,
       d.error_type, d.exception_class, d.error_message, d.traceback, d.retry_count, d.status, d.correlation_id,
       d.failed_at, d.app_correlation_id
FROM listener.dead_letter d;
