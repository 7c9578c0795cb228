-- Number one event, remember it, carry it. One round trip; the same id again changes nothing.
-- KEYS: 1 meta (hash: epoch, seq, loose, run, past)  2 log (stream, entry id = number); for what is not kept: loose
--       3 id of the message, or meta again when it has none
-- ARGV: 1 header (JSON), line feed, event (JSON)  2 sixteen random letters: the mark of this call, and the epoch, should
--       one begin  3 PUBLISH or SPUBLISH  4 most entries  5 log's life in ms  6 meta's life in ms  7 keep: 1 or 0
--       8 1 when this is a repeated try
-- Returns { epoch, seq, duplicate }. The channel is the meta key with `live` for `meta`.
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

local meta, stream, mark = KEYS[1], KEYS[2], ARGV[2]
local base = string.sub(meta, 1, -5)
local replication = redis.call('INFO', 'replication')
local run = string.match(replication, 'master_replid:(%x+)') or ''
local epoch, seq, loose, was, past = unpack(redis.call('HMGET', meta, 'epoch', 'seq', 'loose', 'run', 'past'))
past = past or ''
if not epoch then
  -- The numbering is gone (expired, evicted, flushed): what is in the log belongs to no epoch any more.
  epoch = mark
  if redis.call('DEL', base .. 'log', base .. 'loose') > 0 then past = '? 0 0 1 ' end -- another went before it
  redis.call('HSET', meta, 'epoch', epoch, 'seq', 0, 'run', run, 'past', past)
elseif was ~= run then
  -- Another server, or this one after a restart: it may have less than was told of. What it has goes on under a new
  -- epoch; `past` says up to where the old one holds, and whether it may have gone further.
  if was then
    past = past .. table.concat({ epoch, seq, loose or 0, doubtful(was, replication, base .. 'log') }, ' ') .. ' '
    if #past > 1000 then past = string.match(past, '^.*( %S+ %S+ %S+ %S+ %S+ %S+ %S+ %S+ )$') or '? 0 0 1 ' end
    epoch = mark
  end
  redis.call('HSET', meta, 'epoch', epoch, 'run', run, 'past', past)
end
local keep = ARGV[7] == '1'
-- Presence alone, of people who merely look, is not to leave numberings behind.
redis.call('PEXPIRE', meta, (keep or tonumber(seq or 0) > 0) and ARGV[6] or math.max(ARGV[5], 300000))
local counter, most = keep and 'seq' or 'loose', keep and ARGV[4] or 500
if KEYS[3] ~= meta then
  local known = redis.call('GET', KEYS[3])
  if known then
    local known_epoch, known_seq = string.match(known, '^(%S+) (%d+)$')
    if known_epoch == epoch or string.find(past, known_epoch .. ' ', 1, true) then
      return { epoch, tonumber(known_seq), 1 }
    end
  end
elseif ARGV[8] == '1' then
  for _, entry in ipairs(redis.call('XREVRANGE', stream, '+', '-', 'COUNT', most)) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'm' and entry[2][i + 1] == mark then
        return { epoch, keep and tonumber(string.match(entry[1], '^%d+')) or 0, 1 }
      end
    end
  end
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local number = redis.call('HINCRBY', meta, counter, 1)
redis.call('XADD', stream, 'MAXLEN', most, number .. '-0', 'm', mark, 't', now, 'e', ARGV[1])
redis.call('PEXPIRE', stream, ARGV[5])
seq = keep and number or 0
if KEYS[3] ~= meta then redis.call('SET', KEYS[3], epoch .. ' ' .. seq, 'PX', ARGV[5]) end
redis.call(ARGV[3], base .. 'live', epoch .. (keep and '' or '/' .. number) .. ' ' .. seq .. ' ' .. ARGV[1])
return { epoch, seq, 0 }
