-- Gives Envoy's own refusals the form of the services' ones: a published code, an incident id and retry
-- advice, as grpc-status-details-bin for gRPC and gRPC-Web, as JSON for the others. Reports each to the
-- errors service, within bounds, so that its incident id can be looked up there. Answers HEAD as GET.
--
-- `local_reply_config` in envoy.yaml marks a refusal by response headers, which are removed here:
-- x-hapa-refused: "grpc 503 POST" or "json 503 GET"; x-hapa-refused-at: path, request id, Envoy's reason.
-- A template like envoy.yaml: `hapa gateway` fills in its placeholders. Each worker thread of Envoy has
-- globals of its own for each group of client addresses, so every bound below holds for one of those.

-- Sent with each report; empty where a certificate proves the gateway. "-": no reports.
local REPORT_TOKEN = "${REPORT_TOKEN}"
local REPORT_PATH = "/hapa.errors.v1.GatewayReportService/ReportRefusals"
local REPORT_TIMEOUT_MS = 5000
-- Reports at once, and in each second after that. Requests that no service would take have bounds of
-- their own, so that a flood of them does not hide the gateway's failures.
local REPORTS = {
  requests = {burst = 200, rate = 2},
  failures = {burst = 200, rate = 10},
}
-- How long a HEAD may keep a stream open that GET would keep open for as long as the client reads.
local HEAD_TIMEOUT = "5S"

local INTERNAL = {
  grpc = 13, error = "E5004", reason = "INTERNAL", message = "The gateway failed.",
}
local UNREADABLE = {
  grpc = 3, error = "E4001", reason = "INVALID_INPUT",
  -- Never Envoy's own text: the transcoder's quotes what the caller sent.
  message = "The request can't be read. Send valid JSON that has this method's fields, known query parameters, and a plain path.",
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
    message = "The service can't be reached or is overloaded. Try again.",
  },
  [504] = TIMEOUT,
}

-- LuaJIT starts every state from the same seed: two workers would give out the same ids.
local random_source = assert(io.open("/dev/urandom", "rb"))
local a, b, c, d = random_source:read(4):byte(1, 4)
random_source:close()
math.randomseed(a + b * 0x100 + c * 0x10000 + d * 0x1000000)

local function incident_id()
  return os.date("!INC-%Y%m%d-") .. string.format("%04X%04X", math.random(0, 0xffff), math.random(0, 0xffff))
end

-- Protocol Buffers' wire format: an integer, and a field of type 0 or 2.

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

-- google.rpc.Status with ErrorInfo and, where a retry can help, RetryInfo.
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

-- The same as JSON. Every text above is plain ASCII without quotes and backslashes.
local function json(refusal, incident)
  local details = string.format(
    '{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"%s","domain":"hapa","metadata":{"error_code":"%s","incident_id":"%s"}}',
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
  -- Asynchronous: the refusal does not wait for it, and its outcome changes nothing.
  handle:httpCall("errors", headers, prefix .. message, REPORT_TIMEOUT_MS, true)
end

-- Returns the body of the refusal, nil where it has none.
local function refuse(handle, headers, mark)
  local kind, http, method = mark:match("^(%a+) (%d+) ?(%S*)$")
  http = tonumber(http)
  local refusal = REFUSALS[http] or (http >= 500 and INTERNAL) or UNREADABLE
  local incident = incident_id()
  local at = headers:get("x-hapa-refused-at") or ""
  headers:remove("x-hapa-refused")
  headers:remove("x-hapa-refused-at")
  headers:replace("x-hapa-incident-id", incident) -- the access log has it from here
  headers:replace("cache-control", "no-store")
  headers:replace("x-content-type-options", "nosniff")
  if refusal.retry_seconds then
    headers:replace("retry-after", tostring(refusal.retry_seconds))
  end
  headers:remove("content-length") -- Envoy sets it anew where there is a body
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
    -- A gRPC refusal is one HEADERS frame that ends the stream, and must stay that: no body is made for it.
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
