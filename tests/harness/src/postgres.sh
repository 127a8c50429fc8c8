# A PostgreSQL that lives as long as whoever holds this shell's standard input: at its end, however
# that comes, the server stops and its folder is removed. Orders come by line, answers too.
set -eu
trap '' PIPE
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
dir=$(mktemp -d)
server=
# Tests lose nothing by a power cut; who measures wants what others would get.
case ${1:-hasty} in
  durable) hasty= ;;
  *)
    hasty="-c fsync=off -c synchronous_commit=off -c full_page_writes=off -c shared_buffers=16MB"
    hasty="$hasty -c wal_level=minimal -c max_wal_senders=0"
    ;;
esac
# The server first, so that a frozen one makes no more children.
all() { echo "$server" $(cat "/proc/$server/task/$server/children"); }

start() {
  "$bin/postgres" -D "$dir/data" -k "$dir" -c listen_addresses= -c port=5432 -c max_connections=300 \
    -c dynamic_shared_memory_type=mmap $hasty >>"$dir/log" 2>&1 &
  server=$!
  until "$bin/pg_isready" -q -h "$dir" -p 5432; do
    kill -0 "$server" || { cat "$dir/log" >&2; exit 1; }
    sleep 0.02
  done
}

# Immediately, as a crash would; but the server itself cleans its shared memory up.
stop() {
  [ -n "$server" ] || return 0
  kill -CONT $(all) 2>/dev/null || true # one of them may end just now
  kill -QUIT "$server"
  wait "$server" || true
  server=
}

trap 'stop; rm -rf "$dir"' EXIT
"$bin/initdb" --pgdata "$dir/data" --username postgres --auth=trust --no-sync --encoding=UTF8 \
  --no-locale >"$dir/log" || { cat "$dir/log" >&2; exit 1; }
echo "$dir"
while read -r order; do
  case $order in
    start) start ;;
    stop) stop ;;
    freeze) kill -STOP $(all) 2>/dev/null || true ;;
    thaw) kill -CONT $(all) 2>/dev/null || true ;;
  esac
  echo "$order"
done
