-- Where a topic stands and what it remembers after a number, all of the same moment.
-- KEYS: 1 meta  2 log  3 loose (stream of the last events without a number of their own, entry id = count)
-- ARGV: 1 after this number; nothing: no entries  2 epoch to begin with, should one begin  3 life in ms of a numbering
--       that nothing was published under
-- Returns { epoch, seq, loose, past, now in ms, entries, loose entries }; see `publish` for `past`.
-- Whether this server may have lost events that the one before it (`was`) had told of. A replica that was promoted may
-- lack the last; one that was started anew has only what it wrote down, unless it writes down each event.
local function doubtful(was, replication, log)
  if string.find(replication, 'master_replid2:' .. was, 1, true) then return 1 end
  if string.find(redis.call('INFO', 'persistence'), 'aof_enabled:1', 1, true) then return 0 end
  local uptime = tonumber(string.match(redis.call('INFO', 'server'), 'uptime_in_seconds:(%d+)') or 0)
  local entry = redis.call('XREVRANGE', log, '+', '-', 'COUNT', 1)[1]
  local at = 0
  for i = 1, entry and #entry[2] or 0, 2 do
    if entry[2][i] == 't' then at = tonumber(entry[2][i + 1]) end
  end
  -- It was up already when the last event was published elsewhere: the topic was moved here.
  local time = redis.call('TIME')
  return at > (time[1] - uptime) * 1000 + time[2] / 1000 and 0 or 1
end

local meta, log = KEYS[1], KEYS[2]
local replication = redis.call('INFO', 'replication')
local run = string.match(replication, 'master_replid:(%x+)') or ''
local epoch, seq, loose, was, past = unpack(redis.call('HMGET', meta, 'epoch', 'seq', 'loose', 'run', 'past'))
seq, loose, past = tonumber(seq or 0), tonumber(loose or 0), past or ''
if not epoch then
  epoch = ARGV[2]
  if redis.call('DEL', log, KEYS[3]) > 0 then past = '? 0 0 1 ' end -- another went before it
  redis.call('HSET', meta, 'epoch', epoch, 'seq', 0, 'run', run, 'past', past)
  redis.call('PEXPIRE', meta, ARGV[3])
elseif was ~= run then
  if was then
    past = past .. table.concat({ epoch, seq, loose, doubtful(was, replication, log) }, ' ') .. ' '
    if #past > 1000 then past = string.match(past, '^.*( %S+ %S+ %S+ %S+ %S+ %S+ %S+ %S+ )$') or '? 0 0 1 ' end
    epoch = ARGV[2]
  end
  redis.call('HSET', meta, 'epoch', epoch, 'run', run, 'past', past)
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[1] == '' then return { epoch, seq, loose, past, now, {}, {} } end
local entries = {}
if tonumber(ARGV[1]) < seq then entries = redis.call('XRANGE', log, (tonumber(ARGV[1]) + 1) .. '-0', '+') end
return { epoch, seq, loose, past, now, entries, redis.call('XRANGE', KEYS[3], '-', '+') }
