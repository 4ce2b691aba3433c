-- Posts the bodies of a file in turns and prints what was measured as JSON.
-- Environment: BODIES, a file of "LENGTH\n" + body, again and again; MEDIA_TYPE, of bodies and replies.

local requests, turn = {}, 0

function init(_)
  local file = assert(io.open(os.getenv("BODIES"), "rb"))
  local media_type = os.getenv("MEDIA_TYPE")
  local headers = { ["Content-Type"] = media_type, ["Accept"] = media_type }
  while true do
    local length = file:read("*n")
    if not length then break end
    file:read(1)
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read(length))
  end
  file:close()
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"requests": %d, "seconds": %.6f, "bytes": %d, "p50_ms": %.4f, "p90_ms": %.4f, "p99_ms": %.4f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
