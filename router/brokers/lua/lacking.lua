-- Write down that the numbering lacks something of an epoch before it: a node has seen more of that than the server has.
-- KEYS: 1 meta    ARGV: 1 the epoch that holds now  2 the one before  3 the last number of that which was seen, or nothing
--       where the server has forgotten all of it  4 sixteen random letters  5 PUBLISH or SPUBLISH
-- Returns 1; 0 where another epoch holds by now.
local meta = KEYS[1]
local epoch, seq, loose, past = unpack(redis.call('HMGET', meta, 'epoch', 'seq', 'loose', 'past'))
if epoch ~= ARGV[1] then return 0 end
past = past or ''
local from, to = string.find(past, ARGV[2] .. ' ', 1, true)
if ARGV[3] == '' or not from then
  if not from then redis.call('HSET', meta, 'past', ARGV[2] .. ' 0 0 1 ' .. past) end
  return 1
end
local ended, known, rest = string.match(past, '^(%S+ %S+ )(%S+) (.*)$', to + 1)
if tonumber(known) >= tonumber(ARGV[3]) then return 1 end -- another node told of it
-- Who listens at another node may lack the same, and has gone on with the present epoch: that ends as well, and they hear
-- of it.
past = string.sub(past, 1, to) .. ended .. ARGV[3] .. ' ' .. rest
past = past .. table.concat({ epoch, seq, loose or 0, 1 }, ' ') .. ' '
redis.call('HSET', meta, 'epoch', ARGV[4], 'past', past)
redis.call(ARGV[5], string.sub(meta, 1, -5) .. 'live', ARGV[4] .. ' ' .. seq .. ' ')
return 1
