-- Gives Envoy's own refusals the format of the services' errors: a published code, an incident id and retry
-- advice, as grpc-status-details-bin for gRPC and gRPC-Web, and as JSON otherwise. Reports each refusal to
-- the errors service, rate-limited, so that the incident id can be found there. Handles HEAD like GET.
--
-- `local_reply_config` in envoy.yaml marks a refusal by response headers, which this filter removes:
-- x-hapa-refused: "grpc 503 POST" or "json 503 GET"; x-hapa-refused-at: path, request id, Envoy's reason.
-- Like envoy.yaml this file is a template: `hapa gateway` fills in its placeholders. Each worker thread of
-- Envoy has separate globals for each group of client addresses, so each limit below applies per group and
-- thread.

-- Sent with each report; empty if a certificate authenticates the gateway. "-" disables reports.
local REPORT_TOKEN = "${REPORT_TOKEN}"
local REPORT_PATH = "/hapa.errors.v1.GatewayReportService/ReportRefusals"
local REPORT_TIMEOUT_MS = 5000
-- Token buckets of reports: burst, and rate per second. Invalid requests have a bucket of their own, so that
-- a flood of them does not hide the gateway's failures.
local REPORTS = {
  requests = {burst = 200, rate = 2},
  failures = {burst = 200, rate = 10},
}
-- Bounds a HEAD of a stream, which a GET would keep open for as long as the client reads.
local HEAD_TIMEOUT = "5S"

local INTERNAL = {
  grpc = 13, error = "E5004", reason = "INTERNAL", message = "The gateway failed.",
}
local UNREADABLE = {
  grpc = 3, error = "E4001", reason = "INVALID_INPUT",
  -- Never Envoy's own text: the transcoder quotes the request in it.
  message = "The request can't be read. Send valid JSON that has this method's fields, known query parameters, "
    .. "and a plain path.",
}
local UNSUPPORTED = {
  grpc = 12, error = "E4012", reason = "UNSUPPORTED", message = "There is no such method and path.",
}
local TOO_LARGE = {
  grpc = 8, error = "E4006", reason = "TOO_LARGE",
  message = "The request is too large. A body has at most 1 MiB, all headers together 60 KiB.",
}
local TIMEOUT = {
  grpc = 4, error = "E5001", reason = "MODEL_TIMEOUT", message = "There was no answer in time.",
}
local REFUSALS = {
  [404] = UNSUPPORTED,
  [405] = UNSUPPORTED,
  [408] = TIMEOUT,
  [413] = TOO_LARGE,
  [429] = {
    grpc = 8, error = "E4004", reason = "RATE_LIMITED", retry_seconds = 1,
    message = "Too many requests. Try again later.",
  },
  [431] = TOO_LARGE,
  [503] = {
    grpc = 14, error = "E5005", reason = "OVERLOADED", retry_seconds = 1,
    message = "${OVERLOADED_MESSAGE}",
  },
  [504] = TIMEOUT,
}

-- LuaJIT starts every state from the same seed: without a random one two workers would create the same ids.
local random_source = assert(io.open("/dev/urandom", "rb"))
local a, b, c, d = random_source:read(4):byte(1, 4)
random_source:close()
math.randomseed(a + b * 0x100 + c * 0x10000 + d * 0x1000000)

local function incident_id()
  return os.date("!INC-%Y%m%d-") .. string.format("%04X%04X", math.random(0, 0xffff), math.random(0, 0xffff))
end

-- The wire format of Protocol Buffers: an integer, and fields of wire types 0 and 2.

local function varint(number)
  local bytes = ""
  while number >= 128 do
    bytes = bytes .. string.char(number % 128 + 128)
    number = math.floor(number / 128)
  end
  return bytes .. string.char(number)
end

local function number_field(tag, number)
  return varint(tag * 8) .. varint(number)
end

local function bytes_field(tag, bytes)
  return varint(tag * 8 + 2) .. varint(#bytes) .. bytes
end

local function any(name, message)
  return bytes_field(1, "type.googleapis.com/google.rpc." .. name) .. bytes_field(2, message)
end

local function metadata_field(name, value)
  return bytes_field(3, bytes_field(1, name) .. bytes_field(2, value))
end

-- google.rpc.Status with ErrorInfo and, if a retry can help, RetryInfo.
local function status(refusal, incident)
  local info = bytes_field(1, refusal.reason) .. bytes_field(2, "hapa")
    .. metadata_field("error_code", refusal.error) .. metadata_field("incident_id", incident)
  local bytes = number_field(1, refusal.grpc) .. bytes_field(2, refusal.message)
    .. bytes_field(3, any("ErrorInfo", info))
  if refusal.retry_seconds then
    local delay = number_field(1, refusal.retry_seconds)
    bytes = bytes .. bytes_field(3, any("RetryInfo", bytes_field(1, delay)))
  end
  return bytes
end

-- The same as JSON. No text needs escaping: all are ASCII without quotes and backslashes.
local function json(refusal, incident)
  local details = string.format(
    '{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"%s","domain":"hapa",'
      .. '"metadata":{"error_code":"%s","incident_id":"%s"}}',
    refusal.reason, refusal.error, incident)
  if refusal.retry_seconds then
    details = details .. string.format(
      ',{"@type":"type.googleapis.com/google.rpc.RetryInfo","retry_delay":"%ds"}', refusal.retry_seconds)
  end
  return string.format('{"code":%d,"message":"%s","details":[%s]}', refusal.grpc, refusal.message, details)
end

local function may_report(refusal)
  local bucket = refusal.error:sub(1, 2) == "E4" and REPORTS.requests or REPORTS.failures
  local now = os.time()
  local gained = math.max(0, now - (bucket.at or now)) * bucket.rate
  bucket.left, bucket.at = math.min(bucket.burst, (bucket.left or bucket.burst) + gained), now
  if bucket.left < 1 then
    return false
  end
  bucket.left = bucket.left - 1
  return true
end

local function report(handle, refusal, incident, at)
  if REPORT_TOKEN == "-" or not may_report(refusal) then
    return
  end
  local path, request_id, why = at:match("^(%S*) (%S*) (%S*)$")
  local refused = bytes_field(1, incident) .. bytes_field(2, refusal.error) .. bytes_field(3, path or "")
    .. bytes_field(4, request_id or "") .. bytes_field(5, why or "")
  local message = bytes_field(1, refused)
  local size = #message
  local prefix = string.char(0, math.floor(size / 0x1000000), math.floor(size / 0x10000) % 0x100,
    math.floor(size / 0x100) % 0x100, size % 0x100)
  local headers = {
    [":method"] = "POST", [":path"] = REPORT_PATH, [":authority"] = "errors",
    ["content-type"] = "application/grpc", ["te"] = "trailers",
  }
  if REPORT_TOKEN ~= "" then
    headers["x-mesh-token"] = REPORT_TOKEN
  end
  -- Asynchronous: the refusal neither waits for the report nor depends on its result.
  handle:httpCall("errors", headers, prefix .. message, REPORT_TIMEOUT_MS, true)
end

-- Returns the body of the refusal, nil if it has none.
local function refuse(handle, headers, mark)
  local kind, http, method = mark:match("^(%a+) (%d+) ?(%S*)$")
  http = tonumber(http)
  local refusal = REFUSALS[http] or (http >= 500 and INTERNAL) or UNREADABLE
  local incident = incident_id()
  local at = headers:get("x-hapa-refused-at") or ""
  headers:remove("x-hapa-refused")
  headers:remove("x-hapa-refused-at")
  headers:replace("x-hapa-incident-id", incident) -- the access log reads it from this header
  headers:replace("cache-control", "no-store")
  headers:replace("x-content-type-options", "nosniff")
  if refusal.retry_seconds then
    headers:replace("retry-after", tostring(refusal.retry_seconds))
  end
  headers:remove("content-length") -- Envoy sets it again if there is a body
  report(handle, refusal, incident, at)
  if kind == "grpc" then
    headers:replace(":status", "200")
    headers:replace("grpc-status", tostring(refusal.grpc))
    headers:replace("grpc-message", (refusal.message:gsub("[^ -$&-~]", "?")))
    headers:replace("grpc-status-details-bin", (handle:base64Escape(status(refusal, incident)):gsub("=", "")))
    return nil
  end
  headers:replace("content-type", "application/json")
  return method ~= "HEAD" and json(refusal, incident) or nil
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if headers:get(":method") == "HEAD" then
    headers:replace(":method", "GET")
    headers:replace("grpc-timeout", HEAD_TIMEOUT)
    handle:streamInfo():dynamicMetadata():set("hapa", "head", "yes")
  end
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local hapa = handle:streamInfo():dynamicMetadata():get("hapa")
  local is_head = hapa ~= nil and hapa["head"] ~= nil
  local mark = headers:get("x-hapa-refused")
  if mark then
    local text = refuse(handle, headers, mark)
    -- A gRPC refusal is one HEADERS frame that ends the stream and must stay that, so it gets no body.
    local body = not is_head and handle:body(text ~= nil)
    if body then
      body:setBytes(text or "")
    end
  end
  if is_head then
    for chunk in handle:bodyChunks() do
      chunk:setBytes("")
    end
  end
end
