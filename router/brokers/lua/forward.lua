-- Put one message of a person where backends take it from.
-- KEYS: 1 messages of its kind (stream)
-- ARGV: 1 id of the message  2 header (JSON), line feed, event (JSON)  3 most that may wait for a group
--       4 most that are kept while there is no group, 5 and for how many ms  6 1 when this is a repeated try
-- Returns '' or, when it was not taken in, the group that is too far behind.
local stream, most = KEYS[1], tonumber(ARGV[3])
if ARGV[6] == '1' then
  for _, entry in ipairs(redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 256)) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 'm' and entry[2][i + 1] == ARGV[1] then return '' end
    end
  end
end
local length = redis.call('XLEN', stream)
local groups = redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'GROUPS', stream) or {}
if #groups == 0 then
  redis.call('XADD', stream, 'MAXLEN', ARGV[4], '*', 'm', ARGV[1], 'e', ARGV[2])
  redis.call('PEXPIRE', stream, ARGV[5])
  return ''
end
redis.call('PERSIST', stream)
-- What all groups are done with goes now and then, and always before anything is declined.
if length >= most or length % 1000 == 0 then
  local low, ms, seq, behind
  for _, group in ipairs(groups) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    local first = of['last-delivered-id']
    local pending = redis.call('XPENDING', stream, of['name'])
    local m, s = string.match(pending[1] > 0 and pending[2] or first, '^(%d+)-(%d+)$')
    m, s = tonumber(m), tonumber(s)
    if pending[1] == 0 then s = s + 1 end -- the last that was handed out is done as well
    if not low or m < ms or (m == ms and s < seq) then
      low, ms, seq, behind = string.format('%.0f-%.0f', m, s), m, s, of['name']
    end
  end
  redis.call('XTRIM', stream, 'MINID', low)
  if redis.call('XLEN', stream) >= most then return behind end
end
redis.call('XADD', stream, '*', 'm', ARGV[1], 'e', ARGV[2])
return ''
