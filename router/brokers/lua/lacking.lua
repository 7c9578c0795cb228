-- Write down that the numbering lacks something of an epoch before it: a node has seen more of that than the server has.
-- KEYS: 1 meta    ARGV: 1 the epoch that holds now  2 the one before
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
local past = redis.call('HGET', KEYS[1], 'past') or ''
local from, to = string.find(past, ARGV[2] .. ' ', 1, true)
if from then
  local ended, rest = string.match(past, '^(%S+ %S+ )%S+ (.*)$', to + 1)
  past = string.sub(past, 1, to) .. ended .. '1 ' .. rest
else
  past = ARGV[2] .. ' 0 0 1 ' .. past
end
redis.call('HSET', KEYS[1], 'past', past)
return 1
