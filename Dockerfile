# The image of `listener run`; docker-compose.yml shows it at work. The steps are the Makefile's.
FROM python:3.13-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends git make
WORKDIR /src
COPY . .
RUN make install DIR=/srv/listener

FROM python:3.13-slim
RUN useradd --system --no-create-home --shell /usr/sbin/nologin listener
# An environment works only at the path where it was made.
COPY --from=build /srv/listener /srv/listener
USER listener
EXPOSE 9546
ENTRYPOINT ["/srv/listener/bin/listener"]
CMD ["run"]
