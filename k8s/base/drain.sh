# Drains the gateway before SIGTERM, on which Envoy exits at once. Fails its readiness probe and sends GOAWAY,
# accepts no more connections, and waits for open calls for at most DRAIN_SECONDS.
# Envoy's image has bash but no HTTP client; the admin port listens on loopback only.
ask() { # method and path
  exec 3<>"/dev/tcp/127.0.0.1/${ADMIN_PORT:-9901}" || return
  printf '%s HTTP/1.1\r\nhost: gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n' "$1" >&3
  timeout 5 cat <&3
  exec 3>&-
}

end=$((SECONDS + ${DRAIN_SECONDS:?}))
ask 'POST /healthcheck/fail' >/dev/null
sleep "${DELAY_SECONDS:?}" # load balancers remove the instance; it still answers calls
ask 'POST /drain_listeners?inboundonly&graceful&skip_exit' >/dev/null
while ((SECONDS < end)); do
  ask 'GET /stats?filter=^http.public.downstream_rq_active$' | grep -q 'downstream_rq_active: 0' && break
  sleep 1
done
