"""Whole nodes, Redis, publishers and clients in one process, on virtual time and a virtual network, from one seed.

What is real: the application, its server protocol, redis-py, every byte on a socket. What is not: the clock, the
network, chance, threads. Only `node` knows the router.
"""
