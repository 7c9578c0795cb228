-- Write down that another numbering went before this one, which the server has forgotten. KEYS: 1 meta
-- ARGV: 1 the epoch that holds now  2 the one that a node remembers
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 0 end
local past = redis.call('HGET', KEYS[1], 'past') or ''
if string.find(past, ARGV[2] .. ' ', 1, true) then return 0 end
redis.call('HSET', KEYS[1], 'past', ARGV[2] .. ' 0 0 1 ' .. past)
return 1
