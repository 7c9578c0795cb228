// The browser client against a server, a clock and a window that are played by the test. Nothing here sleeps.
// Run: node --test tests/router/web/client.test.mjs

import assert from "node:assert/strict";
import { beforeEach, describe, it, mock } from "node:test";

import { RouterClient, projectState, reduce, store } from "../../../router/web/client/router.js";

class Clock {
  now = 0;
  #timers = new Map();
  #next = 1;

  setTimeout = (run, ms) => {
    this.#timers.set(this.#next, { run, at: this.now + ms });
    return this.#next++;
  };

  clearTimeout = (timer) => void this.#timers.delete(timer);

  /** Let time go by, timers in their order, and let everything that follows from them happen. */
  async pass(seconds) {
    const until = this.now + 1_000 * seconds;
    for (;;) {
      const [id, timer] = [...this.#timers].sort(([, a], [, b]) => a.at - b.at)[0] ?? [];
      if (!timer || timer.at > until) break;
      this.#timers.delete(id);
      this.now = timer.at;
      timer.run();
      await settled();
    }
    this.now = until;
    await settled();
  }

  /** A laptop that slept: time went by and no timer ran. */
  skip(seconds) {
    this.now += 1_000 * seconds;
  }
}

const settled = () => new Promise(setImmediate);

/** A server with a tape of every connection made to it. */
function makeServer() {
  const connections = [];
  class Connection {
    readyState = 0;
    sent = [];
    closedWith = undefined;

    constructor(url, protocols) {
      Object.assign(this, { url, protocols });
      if (connections.refusing) throw new Error("no network");
      connections.push(this);
    }

    send(text) {
      assert.equal(this.readyState, 1, "sent on a socket that is not open");
      this.sent.push(JSON.parse(text));
    }

    close(code) {
      this.readyState = 2;
      this.closedWith = code;
    }

    serve(...frames) {
      this.readyState = 1;
      for (const frame of frames) this.onmessage({ data: JSON.stringify(frame) });
    }

    welcome(fields) {
      this.serve(welcome(fields));
    }

    end(code, reason = "") {
      this.readyState = 3;
      this.onclose({ code, reason });
    }

    get since() {
      return new URL(this.url).searchParams.get("since");
    }
  }
  return { connections, Connection, last: () => connections.at(-1) };
}

const welcome = (fields) => ({
  type: "welcome",
  session_id: "s-1",
  epoch: "e1",
  pos: 10,
  user: { epoch: "u1", pos: 3 },
  all: { epoch: "a1", pos: 0 },
  recovered: false,
  expires_in: 300,
  ping_every: 30,
  ...fields,
});

const said = (n, fields) => ({ type: "chat_message", role: "user", content: `m${n}`, seq: n, ...fields });

let clock, server, page;

beforeEach(() => {
  clock = new Clock();
  server = makeServer();
  page = new EventTarget();
  page.document = new EventTarget();
  page.document.visibilityState = "visible";
  mock.method(console, "error", () => {});
});

/** A client, what it showed (`events`) and what it told of itself (`told`). */
function makeClient(options) {
  const client = new RouterClient({
    url: "ws://router.test",
    project: "p1",
    token: () => "t1",
    WebSocket: server.Connection,
    window: page,
    now: () => clock.now,
    setTimeout: clock.setTimeout,
    clearTimeout: clock.clearTimeout,
    random: () => 1,
    ...options,
  });
  const events = [];
  const told = [];
  client.on("*", (event) => events.push(event));
  for (const type of ["state", "welcome", "resync", "error", "goaway"]) client.on(type, (event) => told.push(event));
  return {
    client,
    events,
    told,
    shown: () => events.map((event) => event.content),
    states: () => told.filter(({ type }) => type === "state").map(({ state }) => state),
  };
}

/** The same, connected and welcomed. */
async function connected(options, fields) {
  const made = makeClient(options);
  made.client.connect();
  await settled();
  server.last().welcome(fields);
  return made;
}

/** Let the connection break and the next one begin. */
async function comesBack(code = 1006, reason = "", seconds = 1) {
  const before = server.connections.length;
  server.last().end(code, reason);
  await clock.pass(seconds);
  assert.equal(server.connections.length, before + 1, "it did not come back");
  return server.last();
}

async function staysAway(code, reason = "") {
  const before = server.connections.length;
  server.last().end(code, reason);
  await clock.pass(3_600);
  assert.equal(server.connections.length, before, "it came back");
}

describe("connecting", () => {
  it("puts the token into the subprotocol and never into the address", async () => {
    const { client } = makeClient({ project: "a/b c", token: async () => "secret.jwt" });
    client.connect();
    await settled();
    assert.equal(server.last().url, "ws://router.test/ws/project/a%2Fb%20c");
    assert.deepEqual(server.last().protocols, ["router.v1", "bearer.secret.jwt"]);
  });

  it("takes http addresses, as the page's own origin is one", async () => {
    const { client } = makeClient({ url: "https://router.test/" });
    client.connect();
    await settled();
    assert.equal(server.last().url, "wss://router.test/ws/project/p1");
  });

  it("asks a function for the address at each attempt, so that it may come back to another server", async () => {
    const servers = ["ws://one.test", "https://two.test"];
    await connected({ url: async () => servers.shift() });
    assert.equal(server.last().url, "ws://one.test/ws/project/p1");
    const next = await comesBack();
    assert.equal(new URL(next.url).origin, "wss://two.test");
    assert.equal(next.since, "e1:10,user:u1:3,all:a1:0");
  });

  it("waits and asks again when no address could be told", async () => {
    const { client, told } = makeClient({ url: () => assert.fail("all are down") });
    client.connect();
    await settled();
    assert.equal(client.state, "waiting");
    assert.match(told.at(-1).reason, /all are down/);
    await clock.pass(60);
    assert.ok(told.filter(({ state }) => state === "waiting").length > 2);
    assert.equal(server.connections.length, 0);
  });

  it("stays closed when it was closed while the address was being chosen", async () => {
    const { client, states } = makeClient({ url: () => new Promise((chosen) => clock.setTimeout(() => chosen("ws://router.test"), 1_000)) });
    client.connect();
    await settled();
    client.close();
    await clock.pass(60);
    assert.equal(server.connections.length, 0);
    assert.deepEqual(states(), ["connecting", "closed"]);
  });

  it("says what is missing when there is neither a page nor a url", () => {
    assert.throws(() => new RouterClient({ project: "p1", token: "t" }), /`url` must say/);
  });

  it("is open once it is welcome, not before", async () => {
    const { client, states } = makeClient();
    assert.equal(client.state, "closed");
    client.connect();
    await settled();
    assert.equal(client.state, "connecting");
    server.last().welcome();
    assert.equal(client.state, "open");
    assert.deepEqual(states(), ["connecting", "open"]);
  });

  it("connects once, however often it is told to", async () => {
    const { client } = await connected();
    client.connect();
    client.connect();
    await settled();
    assert.equal(server.connections.length, 1);
  });

  it("closes for good when the page says so, also while the token is being fetched", async () => {
    const { client, states } = makeClient();
    client.connect();
    client.close();
    await clock.pass(60);
    assert.equal(server.connections.length, 0);
    assert.deepEqual(states(), ["connecting", "closed"]);
  });

  it("can be opened again after it was closed, and goes on where it was", async () => {
    const { client } = await connected();
    client.close();
    assert.equal(server.last().closedWith, 1000);
    client.connect();
    await settled();
    assert.equal(server.last().since, "e1:10,user:u1:3,all:a1:0");
  });
});

describe("coming back", () => {
  for (const code of [1000, 1009, 4400, 4403, 4404, 4409]) {
    it(`stays away after close code ${code}`, async () => {
      const { told } = await connected();
      await staysAway(code, "because");
      assert.deepEqual(told.at(-1), { type: "state", state: "closed", code, reason: "because" });
    });
  }

  for (const code of [1001, 1005, 1006, 1011, 1012, 1013, 4408, 4999]) {
    it(`comes back after close code ${code}`, async () => {
      await connected();
      await comesBack(code);
    });
  }

  it("doubles the longest wait up to 30 seconds, without giving up, until it is welcome again", async () => {
    const { told } = await connected();
    const waits = [];
    for (let n = 0; n < 8; n++) {
      await comesBack(1006, "", 30);
      waits.push(told.findLast(({ state }) => state === "waiting").retry_in);
    }
    assert.deepEqual(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
    server.last().welcome({ recovered: true });
    await comesBack(1006, "", 1);
  });

  it("waits anything between nothing and the longest wait, so that a crowd does not come back as one", async () => {
    const rolls = [0.25, 0.5];
    const { told } = await connected({ random: () => rolls.shift() });
    await comesBack();
    await comesBack();
    const waits = told.filter(({ state }) => state === "waiting").map(({ retry_in }) => retry_in);
    assert.deepEqual(waits, [0.25, 1]);
  });

  it("does not count as back before the welcome", async () => {
    const { told } = await connected();
    (await comesBack()).readyState = 1; // open, yet not welcome
    server.last().end(1006);
    assert.equal(told.at(-1).retry_in, 2);
  });

  it("stays away for as long as goaway asks, once", async () => {
    const { told } = await connected({ random: () => 0.5 });
    server.last().serve({ type: "goaway", retry_after: 7, reason: "restart" });
    assert.equal(told.at(-1).type, "goaway");
    server.last().end(1012);
    await clock.pass(7.4);
    assert.equal(server.connections.length, 1);
    await clock.pass(0.1);
    assert.equal(server.connections.length, 2);
    server.last().welcome({ recovered: true });
    await comesBack(1006, "", 0.5);
  });

  it("stays away for as long as the reason of a 4429 asks", async () => {
    const { told } = await connected({ random: () => 0 });
    server.last().end(4429, '{"retry_after": 12.5}');
    assert.equal(told.at(-1).retry_in, 12.5);
    await clock.pass(12.5);
    server.last().end(4429, "too many connections of this user; retry after 20 s");
    assert.equal(told.at(-1).retry_in, 20);
  });

  it("stays away for as long as the error before a 4429 asks", async () => {
    const { told } = await connected({ random: () => 0 });
    server.last().serve({ type: "error", code: "limit", message: "too many", temporary: true, retry_after: 9 });
    server.last().end(4429, "too many connections");
    assert.equal(told.at(-1).retry_in, 9);
  });

  it("does not let the error of one declined message delay it", async () => {
    const { told } = await connected({ random: () => 0 });
    server.last().serve({ type: "error", code: "rate_limited", message: "slower", temporary: true, retry_after: 9 });
    server.last().end(1006);
    assert.equal(told.at(-1).retry_in, 0);
  });

  it("comes back when the network is gone altogether", async () => {
    await connected();
    server.connections.refusing = true;
    server.last().end(1006);
    await clock.pass(100);
    server.connections.refusing = false;
    await clock.pass(30);
    assert.equal(server.connections.length, 2);
  });

  it("comes back at once when the network does", async () => {
    await connected();
    for (let n = 0; n < 5; n++) await comesBack(1006, "", 30);
    server.last().end(1006);
    page.dispatchEvent(new Event("online"));
    await settled();
    assert.equal(server.connections.length, 7);
  });

  it("comes back at once when the page is looked at again, not when it is hidden", async () => {
    await connected();
    server.last().end(1006);
    page.document.visibilityState = "hidden";
    page.document.dispatchEvent(new Event("visibilitychange"));
    await settled();
    assert.equal(server.connections.length, 1);
    page.document.visibilityState = "visible";
    page.document.dispatchEvent(new Event("visibilitychange"));
    await settled();
    assert.equal(server.connections.length, 2);
  });

  it("is not woken before the time that the server asked for", async () => {
    await connected();
    server.last().end(4429, "retry_after=60");
    page.dispatchEvent(new Event("online"));
    await clock.pass(59);
    assert.equal(server.connections.length, 1);
    await clock.pass(2);
    assert.equal(server.connections.length, 2);
  });

  it("is not woken by anything once it is closed", async () => {
    const { client } = await connected();
    client.close();
    page.dispatchEvent(new Event("online"));
    page.document.dispatchEvent(new Event("visibilitychange"));
    await clock.pass(60);
    assert.equal(server.connections.length, 1);
  });
});

describe("signs of life", () => {
  it("answers a ping", async () => {
    await connected();
    server.last().serve({ type: "ping" });
    assert.deepEqual(server.last().sent, [{ type: "pong" }]);
  });

  it("drops a connection that was silent for two and a half pings", async () => {
    const { client } = await connected({}, { ping_every: 10 });
    await clock.pass(20);
    server.last().serve({ type: "ping" });
    await clock.pass(24.9);
    assert.equal(client.state, "open");
    await clock.pass(0.1);
    assert.equal(client.state, "waiting");
    assert.equal(server.last().closedWith, 4408);
    await clock.pass(1);
    assert.equal(server.connections.length, 2);
  });

  it("hears nothing more from a connection that it dropped", async () => {
    const { shown } = await connected({}, { ping_every: 10 });
    const dead = server.last();
    await clock.pass(26);
    server.last().welcome({ recovered: true });
    dead.serve(said(11));
    dead.onclose({ code: 1006, reason: "" });
    await clock.pass(10);
    assert.deepEqual(shown(), []);
    assert.equal(server.connections.length, 2);
  });

  it("notices on waking that the connection died in its sleep", async () => {
    const { client } = await connected();
    clock.skip(3_600);
    page.dispatchEvent(new Event("online"));
    assert.equal(client.state, "waiting");
  });

  it("does not wait forever for a handshake, nor for a token", async () => {
    const { client } = makeClient({ token: () => new Promise(() => {}) });
    client.connect();
    await clock.pass(75);
    assert.equal(client.state, "waiting");
  });
});

describe("tokens", () => {
  const tokens = () => {
    let n = 0;
    return mock.fn(() => `t${++n}`);
  };

  it("sends a fresh one when the old one is about to expire", async () => {
    await connected({ token: tokens() });
    server.last().serve({ type: "token_expiring", expires_in: 30 });
    await settled();
    assert.deepEqual(server.last().sent, [{ type: "auth_refresh", token: "t2" }]);
  });

  it("uses a good one again, so that a restart of the router is none for whoever makes tokens", async () => {
    const token = tokens();
    await connected({ token });
    await comesBack();
    assert.equal(token.mock.callCount(), 1);
  });

  it("fetches a new one after 4401 before it comes back", async () => {
    await connected({ token: tokens() });
    const { protocols } = await comesBack(4401);
    assert.deepEqual(protocols, ["router.v1", "bearer.t2"]);
  });

  it("fetches a new one when the old one expired in the meantime", async () => {
    await connected({ token: tokens() }, { expires_in: 20 });
    server.last().serve({ type: "token_refreshed", expires_in: 50 });
    await clock.pass(49);
    const { protocols } = await comesBack();
    assert.deepEqual(protocols, ["router.v1", "bearer.t2"]);
  });

  it("fetches a new one when the last brought no welcome, as a handshake refused by HTTP looks like any failure", async () => {
    const { client } = makeClient({ token: tokens() });
    client.connect();
    await settled();
    const { protocols } = await comesBack(1006);
    assert.deepEqual(protocols, ["router.v1", "bearer.t2"]);
  });

  it("tries again when a token cannot be had", async () => {
    const token = mock.fn(() => "t1");
    token.mock.mockImplementationOnce(() => Promise.reject(new Error("sign-in is down")));
    const { client, told } = makeClient({ token });
    client.connect();
    await settled();
    assert.match(told.at(-1).reason, /sign-in is down/);
    await clock.pass(1);
    assert.equal(server.connections.length, 1);
  });

  it("tells when the token could not be refreshed, and keeps the connection while it lasts", async () => {
    const token = mock.fn(() => "t1");
    const { client, told } = await connected({ token });
    token.mock.mockImplementationOnce(() => Promise.reject(new Error("sign-in is down")));
    server.last().serve({ type: "token_expiring", expires_in: 30 });
    await settled();
    assert.equal(told.at(-1).type, "error");
    assert.equal(client.state, "open");
  });

  it("stays away after 4401 when all it was given is one token", async () => {
    const { client } = await connected({ token: "only" });
    server.last().serve({ type: "token_expiring", expires_in: 30 });
    await staysAway(4401);
    assert.equal(client.state, "closed");
    assert.deepEqual(server.last().sent, []);
  });
});

describe("where it was", () => {
  it("asks for nothing that went before, unless told to", async () => {
    await connected();
    assert.equal(server.connections[0].since, null);
  });

  it("asks for all that history has when `since` is 0, until it knows where it is", async () => {
    const { client } = makeClient({ since: 0 });
    client.connect();
    await settled();
    assert.equal(server.last().since, "0");
    assert.equal((await comesBack()).since, "0");
    server.last().welcome({ recovered: true });
    server.last().serve({ type: "batch", events: [said(1), said(2)], pos: 10 });
    assert.equal((await comesBack()).since, "e1:10,user:u1:3,all:a1:0");
  });

  it("asks for what it missed in each topic", async () => {
    await connected();
    server.last().serve(said(11), said(4, { topic: "user" }), said(1, { topic: "all" }));
    assert.equal((await comesBack()).since, "e1:11,user:u1:4,all:a1:1");
  });

  it("hands its place to a later client, also to one of another page load", async () => {
    const { client: earlier } = await connected({}, { epoch: "e-1" });
    server.last().serve(said(13, { pos: 10 }));
    const { client: later } = makeClient({ since: earlier.since });
    assert.equal(later.since, earlier.since);
    later.connect();
    await settled();
    assert.equal(server.last().since, "e-1:10:13,user:u1:3,all:a1:0");
  });

  it("moves only as far as the server says", async () => {
    const { client } = await connected();
    server.last().serve(said(14, { pos: 11 }));
    assert.match(client.since, /^e1:11:14,/);
    server.last().serve({ type: "batch", events: [said(15, { pos: 11 }), said(12)], pos: 13 });
    assert.match(client.since, /^e1:13:14.15,/);
    server.last().serve(said(16, { pos: 12 }));
    assert.match(client.since, /^e1:13:14.15.16,/);
  });

  it("goes on from the position of its welcome, and what was missed follows that", async () => {
    const { client, shown } = await connected({ since: 0 }, { pos: 4, recovered: true });
    assert.match(client.since, /^e1:4,/);
    server.last().serve({ type: "batch", events: [said(5), said(9)], pos: 10 });
    assert.deepEqual(shown(), ["m5", "m9"]);
    assert.match(client.since, /^e1:10,/);
  });

  it("knows over a reconnect what it has above its position", async () => {
    const { shown } = await connected();
    server.last().serve(said(12, { pos: 10 }));
    server.last().serve(said(14, { pos: 10 }));
    const back = await comesBack();
    assert.equal(back.since, "e1:10:12.14,user:u1:3,all:a1:0");
    back.welcome({ recovered: true });
    back.serve({ type: "batch", events: [said(11), said(12), said(13)], pos: 14 });
    assert.deepEqual(shown(), ["m12", "m14", "m11", "m13"]);
  });

  it("names no more than fits into an address, the newest of what it has", async () => {
    await connected();
    for (let n = 12; n < 1_012; n++) server.last().serve(said(n, { pos: 10 }));
    const named = (await comesBack()).since.split(",")[0].split(":")[2].split(".");
    assert.deepEqual([named.length, named[0], named.at(-1)], [200, "812", "1011"]);
  });

  it("tells the page to load its state again when continuity is lost, and goes on from there", async () => {
    const { client, told, shown } = await connected();
    server.last().serve(said(15, { pos: 10 }));
    const back = await comesBack();
    back.welcome({ epoch: "e2", pos: 2 });
    back.serve({ type: "resync", epoch: "e2", pos: 2, reason: "history is too short" });
    assert.equal(told.at(-1).type, "resync");
    assert.match(client.since, /^e2:2,/);
    back.serve(said(3), said(15));
    assert.deepEqual(shown(), ["m15", "m3", "m15"]);
  });

  it("names the epoch under which the numbers go on, and nothing else changes", async () => {
    const { client, told, shown } = await connected();
    const heard = told.length;
    server.last().serve(said(12, { pos: 10 }));
    server.last().serve({ type: "epoch", epoch: "e2" }, { type: "epoch", topic: "all", epoch: "a2" });
    assert.equal(client.since, "e2:10:12,user:u1:3,all:a2:0");
    server.last().serve(said(11, { pos: 12 }), said(12, { pos: 12 }));
    assert.deepEqual(shown(), ["m12", "m11"], "a number counts as before, and the frame is no event");
    assert.equal(told.length, heard);
    assert.equal((await comesBack()).since, "e2:12,user:u1:3,all:a2:0");
  });

  it("knows what it has above its position also under the epoch that it was told", async () => {
    const { shown } = await connected();
    server.last().serve(said(12, { pos: 10 }), { type: "epoch", epoch: "e2" });
    const back = await comesBack();
    back.welcome({ epoch: "e2", known: [12], recovered: true });
    back.serve({ type: "batch", events: [said(11), said(12), said(13)], pos: 13 });
    assert.deepEqual(shown(), ["m12", "m11", "m13"]);
  });

  it("takes of another epoch only what the welcome names for its own, though the position is the same", async () => {
    const { client, shown } = await connected();
    server.last().serve(said(12, { pos: 10 }), said(13, { pos: 10 }));
    const back = await comesBack();
    back.welcome({ epoch: "e2", known: [13] });
    assert.match(client.since, /^e2:10:13,/);
    back.serve({ type: "batch", events: [said(11), said(12), said(13)], pos: 13 });
    assert.deepEqual(shown(), ["m12", "m13", "m11", "m12"]);
  });

  it("goes on from what the resync names when it had named an epoch that is over", async () => {
    const { client, shown } = await connected();
    server.last().serve(said(12, { pos: 10 }));
    const back = await comesBack();
    back.welcome({ epoch: "e2", pos: 40, known: [42] });
    back.serve({ type: "resync", epoch: "e2", pos: 40, known: [42], reason: "the numbering has started anew" });
    assert.match(client.since, /^e2:40:42,/);
    back.serve({ type: "batch", events: [said(41), said(42), said(43)], pos: 43 });
    assert.deepEqual(shown(), ["m12", "m41", "m43"]);
  });

  it("is shown what a history that was cut still has, after it was told so", async () => {
    const { client, told, shown } = await connected({ since: 0 }, { pos: 7, recovered: false });
    server.last().serve({ type: "resync", epoch: "e1", pos: 7, reason: "history does not reach back" });
    server.last().serve({ type: "batch", events: [said(8), said(10)], pos: 10 });
    assert.equal(told.at(-1).type, "resync");
    assert.deepEqual(shown(), ["m8", "m10"]);
    assert.match(client.since, /^e1:10,/);
  });

  it("resyncs one topic without touching the others", async () => {
    const { client } = await connected();
    server.last().serve({ type: "resync", topic: "user", epoch: "u2", pos: 7, reason: "moved" });
    assert.equal(client.since, "e1:10,user:u2:7,all:a1:0");
  });
});

describe("events", () => {
  it("reach the listeners for their type and those for all", async () => {
    const { client, shown } = await connected();
    const listener = mock.fn();
    const stop = client.on("chat_message", listener);
    server.last().serve(said(11), { type: "step_started", step_id: "s1", seq: 12 });
    stop();
    server.last().serve(said(13));
    assert.equal(listener.mock.callCount(), 1);
    assert.deepEqual(shown(), ["m11", undefined, "m13"]);
  });

  it("are shown once, whether they come alone, in a batch or again", async () => {
    const { shown } = await connected();
    const serve = (...frames) => server.last().serve(...frames);
    serve(said(14, { pos: 10 }));
    serve({ type: "batch", events: [said(12), said(14), said(11)], pos: 12 });
    serve(said(11), said(12), said(13), said(14));
    assert.deepEqual(shown(), ["m14", "m12", "m11", "m13"]);
  });

  it("are told apart by topic", async () => {
    const { shown } = await connected();
    server.last().serve(said(11), said(11, { topic: "user" }), { type: "batch", topic: "all", events: [said(11)], pos: 11 });
    assert.deepEqual(shown(), ["m11", "m11", "m11"]);
  });

  it("without a number are always shown and never asked for", async () => {
    const { client, shown } = await connected();
    const here = { type: "presence_joined", user_id: "ada" };
    server.last().serve(here, here, { type: "batch", events: [here] });
    assert.equal(shown().length, 3);
    assert.match(client.since, /^e1:10,/);
  });

  it("reach every listener even if one of them throws", async () => {
    const { client, shown } = await connected();
    client.on("chat_message", () => {
      throw new Error("bug in the page");
    });
    server.last().serve(said(11));
    assert.deepEqual(shown(), ["m11"]);
    assert.equal(console.error.mock.callCount(), 1);
  });

  it("stop when a listener closes the client in the middle of a batch, and what was not shown is asked for", async () => {
    const { client, shown } = await connected();
    client.on("chat_message", () => client.close());
    server.last().serve({ type: "batch", events: [said(11), said(12)], pos: 12 });
    assert.deepEqual(shown(), ["m11"]);
    assert.match(client.since, /^e1:10:11,/);
  });
});

describe("acknowledgement", () => {
  const critical = (n, fields) => said(n, { message_id: `id${n}`, requires_ack: true, pos: 10, ...fields });
  const acks = () => server.last().sent.filter(({ type }) => type === "ack").map(({ message_id }) => message_id);

  it("is sent once the listeners have run", async () => {
    const { client } = await connected();
    client.on("chat_message", () => assert.deepEqual(acks(), []));
    server.last().serve(critical(11));
    assert.deepEqual(acks(), ["id11"]);
  });

  it("is sent for each event of a batch that asks for it", async () => {
    await connected();
    server.last().serve({ type: "batch", events: [critical(11), said(12), critical(13)], pos: 10 });
    assert.deepEqual(acks(), ["id11", "id13"]);
  });

  it("is sent again for an event that comes again, which is not shown again", async () => {
    const { shown } = await connected();
    server.last().serve(critical(11));
    server.last().serve(critical(11, { redelivered: true, pos: 10 }));
    assert.deepEqual(acks(), ["id11", "id11"]);
    const back = await comesBack();
    back.welcome({ recovered: true });
    back.serve(critical(11, { redelivered: true }));
    assert.deepEqual(acks(), ["id11"]);
    assert.deepEqual(shown(), ["m11"]);
  });

  it("is not sent when a listener throws; the event is shown when it comes again", async () => {
    const { client } = await connected();
    const listener = mock.fn();
    listener.mock.mockImplementationOnce(() => {
      throw new Error("the page was not ready");
    });
    client.on("chat_message", listener);
    server.last().serve(critical(11));
    assert.deepEqual(acks(), []);
    server.last().serve(said(12)); // even if the position has passed it
    server.last().serve(critical(11, { redelivered: true }));
    assert.deepEqual(acks(), ["id11"]);
    assert.equal(listener.mock.callCount(), 3);
  });

  it("remembers a bounded number of message ids, far more than are ever on their way", async () => {
    const { shown } = await connected();
    for (let n = 11; n < 1_100; n++) server.last().serve(critical(n));
    server.last().serve(critical(1_000, { redelivered: true }), critical(11, { redelivered: true }));
    assert.equal(shown().at(-1), "m11");
    assert.equal(shown().length, 1_090);
  });
});

describe("sending", () => {
  const message = (n) => ({ type: "chat_message", role: "user", content: `m${n}` });
  const sent = () => server.last().sent.map(({ content }) => content);

  it("goes out at once on an open connection", async () => {
    const { client } = await connected();
    client.send(message(1));
    assert.deepEqual(server.last().sent, [message(1)]);
  });

  it("waits for the welcome and keeps the order, slowly enough for the rate limit", async () => {
    const { client } = makeClient();
    client.send(message(1));
    client.connect();
    await settled();
    client.send(message(2));
    server.last().welcome();
    client.send(message(3));
    assert.deepEqual(sent(), ["m1"]);
    await clock.pass(0.125);
    assert.deepEqual(sent(), ["m1", "m2"]);
    await clock.pass(0.125);
    assert.deepEqual(sent(), ["m1", "m2", "m3"]);
  });

  it("keeps what waits when the connection breaks while it is going out", async () => {
    const { client } = makeClient();
    for (const n of [1, 2, 3]) client.send(message(n));
    client.connect();
    await settled();
    server.last().welcome();
    const back = await comesBack();
    assert.deepEqual(sent(), []);
    back.welcome();
    await clock.pass(1);
    assert.deepEqual(sent(), ["m2", "m3"]);
  });

  it("refuses loudly when a hundred messages wait already", () => {
    const { client } = makeClient();
    for (let n = 0; n < 100; n++) client.send(message(n));
    assert.throws(() => client.send(message(100)), /100 messages wait already; chat_message was not taken/);
  });

  it("tells of what the server declined", async () => {
    const { told } = await connected();
    const refusal = { type: "error", code: "denied", message: "needs `chat`", temporary: false, ref: "r1" };
    server.last().serve(refusal);
    assert.deepEqual(told.at(-1), refusal);
  });
});

describe("the project's state", () => {
  const after = (...events) => events.reduce(reduce, projectState());

  it("follows a step from its start to its end", () => {
    const started = after({ type: "step_started", step_id: "s1" });
    assert.deepEqual([started.steps.s1.status, started.steps.s1.progress], ["running", 0]);
    const moved = reduce(started, { type: "step_progress", step_id: "s1", progress: 0.5, message: "half" });
    assert.deepEqual([moved.steps.s1.progress, moved.steps.s1.message], [0.5, "half"]);
    const done = reduce(moved, { type: "step_completed", step_id: "s1", result: { rows: 1 } });
    assert.deepEqual([done.steps.s1.status, done.steps.s1.progress], ["completed", 1]);
    assert.equal(started.steps.s1.progress, 0, "the state before must not change");
  });

  it("shows why a step failed, until it runs again", () => {
    const failed = after({ type: "step_error", step_id: "s1", error: "no database" });
    assert.deepEqual([failed.steps.s1.status, failed.steps.s1.error], ["error", "no database"]);
    assert.equal(reduce(failed, { type: "step_started", step_id: "s1" }).steps.s1.error, undefined);
  });

  it("adds and removes steps as the project is changed", () => {
    const added = after({ type: "project_modified", user_id: "ada", changes: { steps_added: ["s1", "s2"] } });
    assert.equal(added.steps.s2.status, "pending");
    const { steps } = reduce(added, { type: "project_modified", changes: { steps_removed: ["s1"] } });
    assert.deepEqual(Object.keys(steps), ["s2"]);
  });

  it("joins the pieces of an answer, whatever their size", () => {
    const chunk = (content, is_complete = false) => ({ type: "chat_response_chunk", content, is_complete });
    const { messages } = after(chunk("Here "), chunk("are the top "), chunk("customers.", true), chunk("Next"));
    assert.deepEqual(
      messages.map(({ content, streaming }) => [content, streaming]),
      [["Here are the top customers.", false], ["Next", true]],
    );
  });

  it("keeps answers apart that stream side by side, with what people say in between", () => {
    const chunk = (stream_id, content) => ({ type: "chat_response_chunk", stream_id, content, is_complete: false });
    const hello = { type: "chat_message", role: "user", content: "hello", user_id: "ada" };
    const { messages } = after(chunk("a", "1"), chunk("b", "x"), hello, chunk("a", "2"), chunk("b", "y"));
    assert.deepEqual(messages.map(({ content }) => content), ["12", "xy", "hello"]);
  });

  describe("with a text whose beginning was not given", () => {
    const chunk = (content, fields) => ({ type: "chat_response_chunk", stream_id: "s", content, is_complete: false, ...fields });
    const torn = (content, fields) => chunk(content, { torn: true, ...fields });
    const end = { is_complete: true };
    const texts = ({ messages }) => messages.map(({ content, streaming }) => [content, streaming]);

    it("does not show it, up to its end", () => {
      const state = after(torn("are "), torn("the "), torn("customers.", end));
      assert.deepEqual([state.messages, state.torn], [[], []]);
    });

    it("does not show the rest either when a server that does not know sends it", () => {
      assert.deepEqual(texts(after(torn("are "), chunk("the "), chunk("customers.", end))), []);
    });

    it("shows the next text of the same stream", () => {
      const { messages, torn: now } = after(torn("are "), torn("customers.", end), chunk("Next "), chunk("one.", end));
      assert.deepEqual([texts({ messages }), now], [[["Next one.", false]], []]);
    });

    it("shows the next text also when the end came from a server that does not know", () => {
      assert.deepEqual(texts(after(torn("are "), chunk("customers.", end), chunk("Next"))), [["Next", true]]);
    });

    it("adds the rest to the text so far that the page has", () => {
      const loaded = { ...projectState(), messages: [{ role: "assistant", content: "Here ", stream_id: "s", streaming: true }] };
      const state = [torn("are "), chunk("the "), torn("customers.", end), chunk("Next")].reduce(reduce, loaded);
      assert.deepEqual(texts(state), [["Here are the customers.", false], ["Next", true]]);
      assert.deepEqual(loaded.messages[0].content, "Here ", "the state before must not change");
    });

    it("does not begin it anew behind one that the page has as complete", () => {
      const loaded = { ...projectState(), messages: [{ role: "assistant", content: "Here.", stream_id: "s", streaming: false }] };
      assert.deepEqual(texts([torn("are "), chunk("the ")].reduce(reduce, loaded)), [["Here.", false]]);
    });

    it("shows all others", () => {
      const { messages } = after(torn("are "), chunk("other", { stream_id: "t" }), chunk("bare", { stream_id: undefined }));
      assert.deepEqual(texts({ messages }), [["other", true], ["bare", true]]);
    });

    it("tells streams apart by any id that a stream may have, also by none", () => {
      const ids = ["__proto__", "constructor", "toString", "", undefined, null];
      for (const stream_id of ids) {
        const state = after(torn("a", { stream_id }), chunk("b", { stream_id }), chunk("c"));
        assert.deepEqual(texts(state), [["c", true]], `${stream_id}`);
        assert.equal({}.torn, undefined);
      }
      const bare = after(torn("a", { stream_id: undefined }), chunk("b", { stream_id: null }), chunk("c", { stream_id: null, ...end }));
      assert.deepEqual([bare.messages, bare.torn], [[], []]);
      const loaded = { ...projectState(), messages: [{ role: "assistant", content: "a", stream_id: null, streaming: true }] };
      assert.deepEqual(texts(reduce(loaded, torn("b", { stream_id: undefined }))), [["ab", true]]);
    });

    it("knows it again after the state was kept as JSON", () => {
      const state = JSON.parse(JSON.stringify(after(torn("a", { stream_id: undefined }), torn("b"))));
      assert.deepEqual(texts([chunk("c", { stream_id: undefined }), chunk("d")].reduce(reduce, state)), []);
    });

    it("takes a state that was made before there was such a thing", () => {
      const { torn: _, ...old } = projectState();
      assert.deepEqual(texts([torn("a"), chunk("b"), chunk("c", { stream_id: "t" })].reduce(reduce, old)), [["c", true]]);
    });

    it("leaves the state that it was given as it was", () => {
      const freeze = (state) => Object.freeze({ ...state, messages: Object.freeze(state.messages), torn: Object.freeze(state.torn) });
      const frozen = (state, event) => freeze(reduce(state, event));
      const events = [torn("a"), torn("b", { stream_id: "t" }), chunk("c"), torn("d", end), chunk("e")];
      const state = events.reduce(frozen, freeze(projectState()));
      assert.deepEqual([texts(state), state.torn], [[["e", true]], ["t"]]);
    });
  });

  it("knows who is here, each of them once", () => {
    const joined = (user_id) => ({ type: "presence_joined", user_id });
    const state = after(joined("grace"), joined("ada"), joined("ada"));
    assert.deepEqual(state.people, ["ada", "grace"]);
    assert.deepEqual(reduce(state, { type: "presence_left", user_id: "ada" }).people, ["grace"]);
  });

  it("stays the very same for events that it does not know", () => {
    const state = projectState();
    assert.equal(reduce(state, { type: "cursor_moved" }), state);
  });
});

describe("the store", () => {
  it("keeps Svelte's contract: the value at once, then each change, then silence", async () => {
    const { client } = await connected();
    const run = mock.fn();
    const unsubscribe = store(client).subscribe(run);
    assert.equal(run.mock.callCount(), 1);
    assert.equal(run.mock.calls[0].arguments[0].connection, "open");
    server.last().serve({ type: "step_started", step_id: "s1", seq: 11 });
    assert.equal(run.mock.calls[1].arguments[0].steps.s1.status, "running");
    unsubscribe();
    server.last().serve({ type: "step_started", step_id: "s2", seq: 12 });
    assert.equal(run.mock.callCount(), 2);
  });

  it("is empty after a resync of the project, until the page has set what it loaded", async () => {
    const { client } = await connected();
    const project = store(client);
    let value;
    project.subscribe((now) => (value = now));
    server.last().serve(said(11), { type: "resync", topic: "user", epoch: "u2", pos: 0, reason: "moved" });
    assert.equal(value.messages.length, 1);
    server.last().serve({ type: "resync", epoch: "e2", pos: 40, reason: "history is too short" });
    assert.equal(value.messages.length, 0);
    project.set({ people: ["ada"] });
    assert.deepEqual([value.people, value.connection], [["ada"], "open"]);
  });

  describe("after a resync in the middle of an answer", () => {
    const chunk = (n, content, fields) => ({ type: "chat_response_chunk", seq: n, stream_id: "s", content, is_complete: false, ...fields });
    const soFar = { role: "assistant", content: "Here are ", stream_id: "s", streaming: true };
    const texts = ({ messages }) => messages.map(({ content }) => content);

    /** A store that has shown the beginning of an answer and was then told `resync`; and what it is now. */
    async function resynced() {
      const made = await connected();
      const project = store(made.client);
      const now = {};
      project.subscribe((value) => Object.assign(now, value));
      server.last().serve(chunk(11, "Here "));
      server.last().serve({ type: "resync", epoch: "e1", pos: 12, reason: "history is too short" });
      return { ...made, project, now };
    }

    it("shows nothing of it that the page has not loaded", async () => {
      const { now } = await resynced();
      server.last().serve(chunk(13, "the ", { torn: true }), chunk(14, "customers", { torn: true, is_complete: true }), chunk(15, "Next"));
      assert.deepEqual(texts(now), ["Next"]);
    });

    it("adds the rest to what the page has loaded, also on another server", async () => {
      const { project, now } = await resynced();
      project.set({ messages: [soFar] });
      server.last().serve(chunk(13, "the ", { torn: true }));
      const back = await comesBack();
      back.welcome({ pos: 13, recovered: true });
      back.serve(chunk(14, "customers", { is_complete: true }), chunk(15, "Next"));
      assert.deepEqual(texts(now), ["Here are the customers", "Next"]);
    });

    it("still leaves it out on another server, whatever else the page has set meanwhile", async () => {
      const { project, now } = await resynced();
      server.last().serve(chunk(13, "the ", { torn: true }));
      project.set({ ...projectState(), messages: [{ role: "user", content: "hello", streaming: false }] });
      const back = await comesBack();
      back.welcome({ pos: 13, recovered: true });
      back.serve(chunk(14, "customers"));
      assert.deepEqual(texts(now), ["hello"]);
    });

    it("gives the torn texts of a state that was kept to a later store", async () => {
      const { now } = await resynced();
      server.last().serve(chunk(13, "the ", { torn: true }));
      const { messages, torn } = structuredClone(now);
      const { client } = await connected();
      const later = store(client);
      later.set({ messages, torn });
      server.last().serve(chunk(14, "customers"));
      later.subscribe((value) => assert.deepEqual(texts(value), []));
    });

    it("forgets what was torn with the next resync: the server says it again", async () => {
      const { now } = await resynced();
      server.last().serve(chunk(13, "the ", { torn: true }));
      assert.deepEqual(now.torn, ["s"]);
      server.last().serve({ type: "resync", epoch: "e2", pos: 0, reason: "the numbering has started anew" });
      assert.deepEqual(now.torn, []);
    });
  });
});
