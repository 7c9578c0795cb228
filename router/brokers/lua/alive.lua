-- Which leases count at this moment, by the server's clock. KEYS: 1 nodes
local t = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], t[1] * 1000 + math.floor(t[2] / 1000), '+inf')
