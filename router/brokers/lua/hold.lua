-- Say for how long messages have been left alone: for no time, while their consumer is at work on them.
-- Only of those that are still its own: another that took one over must not lose it again.
-- KEYS: the messages of each kind (streams)
-- ARGV: 1 group  2 consumer  3 ms, then of each message the place of its key and its entry
-- Returns the places, from 0, of those that are no longer its own.
local lost = {}
for i = 4, #ARGV - 1, 2 do
  local stream, entry = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  local own = redis.pcall('XPENDING', stream, ARGV[1], entry, entry, 1, ARGV[2])
  if own.err or #own == 0 then
    lost[#lost + 1] = (i - 4) / 2
  else
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, entry, 'IDLE', ARGV[3], 'JUSTID')
  end
end
return lost
