-- Give a seat back. KEYS: 1 in all  2 of the user  3 of the project    ARGV: 1 node
for i = 1, 3 do
  if redis.call('HINCRBY', KEYS[i], ARGV[1], -1) <= 0 then redis.call('HDEL', KEYS[i], ARGV[1]) end
end
return 1
