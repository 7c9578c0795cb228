-- Have a group consume, from the oldest message that is there. Where it does already, nothing changes.
-- KEYS: the messages of each kind (streams)    ARGV: 1 group
for _, stream in ipairs(KEYS) do
  local made = redis.pcall('XGROUP', 'CREATE', stream, ARGV[1], '0', 'MKSTREAM')
  if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
  redis.call('PERSIST', stream) -- from now on somebody wants what is in it
end
return 1
