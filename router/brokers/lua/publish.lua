-- Number one event, remember it, carry it. One round trip; the same id again changes nothing.
-- KEYS: 1 meta (hash: epoch, seq)  2 log (stream, entry id = number)  3 id of the message, or meta again when it has none
-- ARGV: 1 header (JSON), line feed, event (JSON)  2 sixteen random letters: the mark of this call, and the epoch to
--       begin with should there be none  3 PUBLISH or SPUBLISH  4 most entries  5 log's life in ms  6 meta's life in ms
--       7 keep: 1 or 0  8 1 when this is a repeated try
-- Returns { epoch, seq, duplicate }. The channel is the meta key with `live` for `meta`.
local channel = string.sub(KEYS[1], 1, -5) .. 'live'
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then
  -- The numbering is gone (expired, evicted, flushed): what is in the log belongs to no epoch any more.
  epoch = ARGV[2]
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'seq', 0)
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
if ARGV[7] == '0' then
  redis.call(ARGV[3], channel, epoch .. ' 0 ' .. ARGV[1])
  return { epoch, 0, 0 }
end
if KEYS[3] ~= KEYS[1] then
  local known = redis.call('GET', KEYS[3])
  if known then
    local known_epoch, known_seq = string.match(known, '^(%S+) (%d+)$')
    if known_epoch == epoch then return { epoch, tonumber(known_seq), 1 } end
  end
elseif ARGV[8] == '1' then
  for _, entry in ipairs(redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', ARGV[4])) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'm' and entry[2][i + 1] == ARGV[2] then
        return { epoch, tonumber(string.match(entry[1], '^%d+')), 1 }
      end
    end
  end
end
local seq = redis.call('HINCRBY', KEYS[1], 'seq', 1)
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[4], seq .. '-0', 'm', ARGV[2], 'e', ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if KEYS[3] ~= KEYS[1] then redis.call('SET', KEYS[3], epoch .. ' ' .. seq, 'PX', ARGV[5]) end
redis.call(ARGV[3], channel, epoch .. ' ' .. seq .. ' ' .. ARGV[1])
return { epoch, seq, 0 }
