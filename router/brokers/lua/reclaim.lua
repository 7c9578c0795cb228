-- Take over what consumers of a group left alone. What was handed out too often becomes a dead letter.
-- KEYS: of each kind its messages and its dead letters (streams)
-- ARGV: 1 group  2 consumer  3 left alone for so many ms  4 tries  5 most of each kind  6 reason  7 most dead letters
--       8 ms after which a consumer that has nothing and asks for nothing is forgotten
-- Returns { { place of the kind, from 0, entry, fields, how often handed out }, ... } and of each that became a dead
-- letter the place of its kind.
-- Should the answer be lost: what was taken over is left alone for its time again, and no more than that.
local function addressee(fields)
  for i = 1, #fields, 2 do
    if fields[i] == 'g' then return fields[i + 1] end
  end
end
local taken, buried = {}, {}
for k = 1, #KEYS, 2 do
  local stream, group, count = KEYS[k], ARGV[1], 0
  local left = redis.pcall('XPENDING', stream, group, 'IDLE', ARGV[3], '-', '+', 100)
  for _, pending in ipairs(left.err and {} or left) do
    local id, delivered = pending[1], pending[4]
    local entry = redis.call('XRANGE', stream, id, id)[1]
    if not entry or (addressee(entry[2]) or group) ~= group then
      redis.call('XACK', stream, group, id) -- deleted by hand, or put back for another group
    elseif delivered >= tonumber(ARGV[4]) then
      redis.call('XADD', KEYS[k + 1], 'MAXLEN', ARGV[7], '*', 'g', group, 'n', delivered, 'r', ARGV[6], unpack(entry[2]))
      redis.call('XACK', stream, group, id)
      buried[#buried + 1] = (k - 1) / 2
    elseif count < tonumber(ARGV[5]) then
      redis.call('XCLAIM', stream, group, ARGV[2], 0, id)
      count = count + 1
      taken[#taken + 1] = { (k - 1) / 2, id, entry[2], delivered + 1 }
    end
  end
  local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
  for _, consumer in ipairs(consumers.err and {} or consumers) do
    local of = {}
    for i = 1, #consumer, 2 do of[consumer[i]] = consumer[i + 1] end
    if of['pending'] == 0 and of['idle'] > tonumber(ARGV[8]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, group, of['name'])
    end
  end
end
return { taken, buried }
