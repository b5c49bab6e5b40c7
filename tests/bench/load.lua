-- What wrk sends: `wrk ... -s load.lua URL -- WORKLOAD ROWS`. The requests are written once, so that the load generator
-- spends as little of the machine as it can.
local requests, sent = {}, 0

function init(args)
  local workload, rows = args[1], tonumber(args[2])
  if workload == "read" then
    for id = 1, rows do requests[id] = wrk.format("GET", "/api/notes/" .. id) end
  elseif workload == "page" then
    for after = 0, rows - 21, 20 do
      requests[#requests + 1] = wrk.format("GET", "/api/notes?limit=20&after=" .. after)
    end
  elseif workload == "write" then
    local headers = { ["Content-Type"] = "application/json" }
    local body = string.format('{"title":"A note that was written","body":"%s"}', string.rep("word ", 40))
    requests[1] = wrk.format("POST", "/api/notes", headers, body)
  elseif workload == "mixed" then
    for id = 1, rows do requests[id] = wrk.format("GET", id % 10 == 0 and "/slow" or "/api/notes/" .. id) end
  elseif workload == "waits" then
    for id = 1, rows do requests[id] = wrk.format("GET", id % 2 == 0 and "/slow" or "/api/notes/" .. id) end
  elseif workload == "largest" then
    requests[1] = wrk.format("GET", "/api/notes?limit=100&after=" .. rows)
  else
    requests[1] = wrk.format("GET", "/slow")
  end
end

function request()
  sent = sent % #requests + 1
  return requests[sent]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\n{"requests": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f, "failed": %d, "broken": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout))
end
