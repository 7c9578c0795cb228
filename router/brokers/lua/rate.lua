-- Take from a user's budget of messages, which all nodes share (generic cell rate algorithm, the server's clock).
-- KEYS: 1 when the budget will be full again (s)  2 seats of the user (hash: lease -> seats)
-- ARGV: 1 cost  2 rate, messages a second  3 burst  4 1 when this is a repeated try: then it passes, since the try
--       before may have taken already
-- Returns { seconds to wait, '0' when it passed; on how many leases the user has seats }.
if ARGV[4] == '1' then return { '0', 2 } end
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now) + ARGV[1] / ARGV[2]
local wait = full - now - ARGV[3] / ARGV[2]
local leases = redis.call('HLEN', KEYS[2])
if wait > 0.000001 then return { string.format('%.6f', wait), leases } end
redis.call('SET', KEYS[1], string.format('%.6f', full), 'PX', math.ceil((full - now) * 1000) + 1)
return { '0', leases }
