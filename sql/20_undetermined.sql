-- undetermined(relation): stub
CREATE OR REPLACE FUNCTION listener.undetermined(relation regclass) RETURNS TABLE (what text, fix text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN;
END
$function$;
