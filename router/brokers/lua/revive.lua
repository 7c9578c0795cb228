-- Put dead letters back, each for the group that it was of.
-- KEYS: 1 messages of their kind  2 dead letters of their kind (streams)    ARGV: the entries, then one that is not looked at
for i = 1, #ARGV - 1 do
  local entry = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  if entry then
    local of = {}
    for j = 1, #entry[2], 2 do of[entry[2][j]] = entry[2][j + 1] end
    redis.call('XADD', KEYS[1], '*', 'm', of['m'] or '', 'e', of['e'] or '', 'g', of['g'])
    redis.call('XDEL', KEYS[2], ARGV[i])
  end
end
return 1
