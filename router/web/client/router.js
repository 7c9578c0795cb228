// @ts-check
/**
 * The browser's side of Event Router: one project, live, across everything that happens to a connection.
 *
 *     import { RouterClient } from "/client/router.js";
 *
 *     const client = new RouterClient({ project: "p1", token: () => fetchToken(), since: 0 });
 *     client.on("step_progress", (event) => show(event.step_id, event.progress));
 *     client.on("resync", () => loadEverythingAgain());
 *     client.connect();
 *
 * One ES module: no build, no dependency. It runs wherever there is a `WebSocket`.
 */

/**
 * @typedef {{ type: string, seq?: number, pos?: number, topic?: string, message_id?: string, requires_ack?: boolean,
 *   redelivered?: boolean, torn?: boolean, [field: string]: any }} RouterEvent  an event, as the server sends it; `torn`:
 *   a piece of a text whose beginning we were not given, nothing to show unless the page has loaded the text so far
 * @typedef {"connecting" | "open" | "waiting" | "closed"} ConnectionState
 * @typedef {(event: any) => void} Listener
 *
 * @typedef {object} Options
 * @property {string} project  the project's id
 * @property {string | (() => string | Promise<string>)} token  a JWT, or what fetches one: only a function lets the
 *   connection outlive its first token
 * @property {string | (() => string | Promise<string>)} [url]  `wss://host`, or what chooses one for each attempt;
 *   without it, the page's own host
 * @property {0 | string} [since]  0: begin with all that history has. A string: where an earlier client's `since` ended
 * @property {typeof WebSocket} [WebSocket]
 * @property {any} [window]  where `online` and `visibilitychange` are heard
 * @property {() => number} [now]  milliseconds
 * @property {(run: () => void, ms: number) => any} [setTimeout]
 * @property {(timer: any) => void} [clearTimeout]
 * @property {() => number} [random]  0 to 1
 */

/** The server will not have us, or there is nothing more to come: these closes are for good. */
const FINAL = new Set([1000, 1009, 4400, 4403, 4404, 4409]);
const BAD_TOKEN = 4401;
const LIMIT = 4429;
const LOST = 1006;

const FIRST_DELAY = 1_000;
const LONGEST_DELAY = 30_000;
/** So many messages may wait for a connection. They leave one by one, below the 10 a second that a user may send. */
const OUTBOX = 100;
const OUTBOX_PACE = 125;
/** So many message ids are remembered: far more than can be on their way. */
const REMEMBERED = 1_000;
/** So many numbers above the position are named on coming back: what fits into an address. */
const NAMED = 200;

/** What of one topic has been seen: everything up to `pos`, and some of what is above. */
class Place {
  epoch = "";
  pos = 0;
  /** @type {Set<number>} */
  #above = new Set();

  /** @param {string} epoch @param {number} pos @param {number[]} [above] */
  reset(epoch, pos, above = []) {
    this.epoch = epoch;
    this.pos = pos;
    this.#above = new Set(above);
  }

  /** @param {number} seq */
  has = (seq) => seq <= this.pos || this.#above.has(seq);

  /** @param {number} seq */
  add = (seq) => void (seq > this.pos && this.#above.add(seq));

  /** The server says that we have everything up to `pos`. @param {number} pos */
  reach(pos) {
    if (pos <= this.pos) return;
    this.pos = pos;
    for (const seq of this.#above) if (seq <= pos) this.#above.delete(seq);
  }

  /** As the server reads it: what is above `pos` is named, for the server may be about to merge it with what is not. */
  toString() {
    const above = [...this.#above].slice(-NAMED).join(".");
    return `${this.epoch}:${this.pos}${above && `:${above}`}`;
  }
}

/**
 * One person's live connection to one project.
 *
 * It comes back by itself, with jitter and without giving up, tells the server where it was and drops what it has
 * already shown. `on("resync")` is the one thing that a page must not ignore: the server could not bridge the gap.
 */
export class RouterClient {
  #options;
  /** @type {Map<string, Set<Listener>>} */
  #listeners = new Map();
  /** @type {ConnectionState} */
  #state = "closed";
  /** @type {WebSocket | undefined} */
  #socket;
  /** Goes up when a connection begins or ends, so that whatever belonged to an earlier one finds out. */
  #life = 0;
  /** Attempts since the last welcome. */
  #failures = 0;
  #pingEvery = 30_000;
  #heardAt = 0;
  /** Seconds that the server wants us to stay away: by `goaway`, and by the last `error`. */
  #goneFor = 0;
  #limitedFor = 0;
  #notBefore = 0;
  #token = "";
  #tokenUntil = Infinity;
  /** @type {Record<string, Place>} */
  #places = { project: new Place(), user: new Place(), all: new Place() };
  /** @type {Set<string>} */
  #messageIds = new Set();
  /** @type {RouterEvent[]} */
  #outbox = [];
  /** @type {Record<string, any>} */
  #timers = {};

  /** @param {Options} options */
  constructor(options) {
    this.#options = {
      url: globalThis.location?.origin,
      since: "",
      WebSocket: globalThis.WebSocket,
      window: globalThis,
      now: Date.now,
      setTimeout: (/** @type {() => void} */ run, /** @type {number} */ ms) => globalThis.setTimeout(run, ms),
      clearTimeout: (/** @type {any} */ timer) => globalThis.clearTimeout(timer),
      random: Math.random,
      ...options,
    };
    if (!this.#options.url) throw new TypeError("RouterClient: outside a page, `url` must say where the server is");
    for (const part of String(this.#options.since || "").split(",")) {
      const [, topic = "project", epoch, pos, above] = /^(?:(user|all):)?(\w.*?):(\d+)(?::([\d.]+))?$/.exec(part) ?? [];
      if (epoch) this.#place(topic).reset(epoch, Number(pos), above?.split(".").map(Number));
    }
  }

  /** @returns {ConnectionState} */
  get state() {
    return this.#state;
  }

  /** Where this client is: give it to a later one as `since`, and that goes on from here. */
  get since() {
    if (!this.#places.project.epoch) return String(this.#options.since) === "0" ? "0" : "";
    return Object.entries(this.#places)
      .filter(([, { epoch }]) => epoch)
      .map(([topic, place]) => (topic === "project" ? `${place}` : `${topic}:${place}`))
      .join(",");
  }

  /**
   * Hear about events of a type, `"*"` for every type; or about the connection: `state`, `welcome`, `resync`, `error`,
   * `goaway`. An event that requires acknowledgement is acknowledged unless a listener throws.
   *
   * @param {string} type
   * @param {Listener} listener
   * @returns {() => void} ends it
   */
  on(type, listener) {
    const listeners = this.#listeners.get(type) ?? new Set();
    this.#listeners.set(type, listeners.add(listener));
    return () => void listeners.delete(listener);
  }

  /** Connect, and stay connected until `close()` or until the server says for good. */
  connect() {
    if (this.#state === "connecting" || this.#state === "open") return;
    this.#options.window.addEventListener?.("online", this.#wake);
    this.#options.window.document?.addEventListener("visibilitychange", this.#wake);
    void this.#open();
  }

  /**
   * Send an event. Without a connection it waits for the next one.
   *
   * @param {RouterEvent} event
   * @throws when too many wait already
   */
  send(event) {
    if (this.#state === "open" && this.#outbox.length === 0) return this.#transmit(event);
    if (this.#outbox.length >= OUTBOX) {
      throw new Error(`RouterClient: not connected, and ${OUTBOX} messages wait already; ${event.type} was not taken`);
    }
    this.#outbox.push(event);
  }

  /** End it. What still waits to be sent is dropped. */
  close() {
    this.#outbox.length = 0;
    this.#end(1000, "closed by the page");
  }

  // Coming and going

  async #open() {
    const life = ++this.#life;
    this.#stop("retry");
    this.#heardAt = this.#options.now();
    this.#watch();
    this.#become("connecting");
    if (life !== this.#life) return;
    try {
      const token = await this.#validToken();
      if (life !== this.#life) return;
      const { url: given, project, WebSocket } = this.#options;
      const url = typeof given === "function" ? await given() : given;
      if (life !== this.#life) return;
      const since = this.since;
      const address = `${url.replace(/^http/, "ws").replace(/\/$/, "")}/ws/project/${encodeURIComponent(project)}`;
      const socket = new WebSocket(since ? `${address}?since=${encodeURIComponent(since)}` : address, ["router.v1", `bearer.${token}`]);
      this.#socket = socket;
      socket.onmessage = ({ data }) => life === this.#life && this.#receive(data);
      socket.onclose = ({ code, reason }) => life === this.#life && this.#lost(code, reason);
    } catch (error) {
      if (life === this.#life) this.#lost(LOST, String(error));
    }
  }

  /** The connection is gone: decide whether, when and how to come back. @param {number} code @param {string} reason */
  #lost(code, reason) {
    if (FINAL.has(code)) return this.#end(code, reason);
    // Where HTTP refused the handshake all we hear is 1006, so a token that brought no welcome is not trusted again.
    if (code === BAD_TOKEN || this.#state !== "open") this.#token = "";
    if (code === BAD_TOKEN && typeof this.#options.token === "string") return this.#end(code, reason);
    const said = code === LIMIT ? Number(/retry.after\D{0,4}([\d.]+)/.exec(reason)?.[1]) || this.#limitedFor : 0;
    const away = 1_000 * Math.max(said, this.#goneFor);
    const jitter = this.#options.random() * Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** this.#failures);
    this.#failures += 1;
    this.#goneFor = this.#limitedFor = 0;
    this.#drop(code);
    this.#notBefore = this.#options.now() + away;
    this.#later("retry", away + jitter, () => void this.#open());
    this.#become("waiting", { code, reason, retry_in: (away + jitter) / 1_000 });
  }

  /** Stay away. @param {number} code @param {string} reason */
  #end(code, reason) {
    this.#drop(code);
    this.#stop("retry");
    this.#failures = 0;
    this.#options.window.removeEventListener?.("online", this.#wake);
    this.#options.window.document?.removeEventListener("visibilitychange", this.#wake);
    this.#become("closed", { code, reason });
  }

  /** @param {number} code */
  #drop(code) {
    this.#life += 1;
    this.#stop("watch");
    this.#stop("outbox");
    const socket = this.#socket;
    this.#socket = undefined;
    // A half-open socket would take minutes to say that it is closed, so nobody waits for that.
    if (socket && socket.readyState < 2) socket.close(code === 1000 ? 1000 : 4408);
  }

  /** The network or the reader is back: no reason to wait, unless the server asked us to. */
  #wake = () => {
    if (this.#options.window.document?.visibilityState === "hidden") return;
    if (this.#state === "waiting" && this.#options.now() >= this.#notBefore) void this.#open();
    else if (this.#socket) this.#watch();
  };

  /** A connection that has been silent for two and a half pings is dead, whatever the socket says. */
  #watch() {
    const left = this.#heardAt + 2.5 * this.#pingEvery - this.#options.now();
    if (left <= 0) this.#lost(LOST, "no sign of life");
    else this.#later("watch", left, () => this.#watch());
  }

  // Tokens

  /** The token in hand while that is good, else a new one. */
  async #validToken() {
    const { token, now } = this.#options;
    if (!this.#token || now() >= this.#tokenUntil) {
      this.#token = typeof token === "function" ? await token() : token;
      this.#tokenUntil = Infinity;
    }
    return this.#token;
  }

  async #refreshToken() {
    if (typeof this.#options.token === "string") return;
    const life = this.#life;
    this.#token = "";
    try {
      const token = await this.#validToken();
      if (life === this.#life) this.#transmit({ type: "auth_refresh", token });
    } catch (error) {
      this.#emit("error", { type: "error", code: "token", message: String(error), temporary: true });
    }
  }

  /** @param {number | null} [seconds] */
  #tokenExpires(seconds) {
    this.#tokenUntil = seconds == null ? Infinity : this.#options.now() + 1_000 * seconds;
  }

  // What comes in

  /** @param {string} data */
  #receive(data) {
    this.#heardAt = this.#options.now();
    const frame = JSON.parse(data);
    switch (frame.type) {
      case "ping":
        return this.#transmit({ type: "pong" });
      case "welcome":
        return this.#welcome(frame);
      case "batch":
        return this.#batch(frame);
      case "resync":
        this.#place(frame.topic).reset(frame.epoch, frame.pos, frame.known);
        return this.#emit("resync", frame);
      case "epoch": // the numbers go on: all that changes is what they are called in `since`
        this.#place(frame.topic).epoch = frame.epoch;
        return;
      case "token_expiring":
        return void this.#refreshToken();
      case "token_refreshed":
        return this.#tokenExpires(frame.expires_in);
      case "goaway":
        this.#goneFor = frame.retry_after ?? 0;
        return this.#emit("goaway", frame);
      case "error":
        this.#limitedFor = frame.retry_after ?? 0;
        return this.#emit("error", frame);
      default:
        this.#event(frame, frame.topic);
        if (frame.seq) this.#place(frame.topic).reach(frame.pos ?? frame.seq);
    }
  }

  /** @param {any} frame */
  #welcome(frame) {
    this.#failures = this.#goneFor = this.#limitedFor = this.#notBefore = 0;
    this.#pingEvery = 1_000 * (frame.ping_every || 30);
    this.#tokenExpires(frame.expires_in);
    // Events follow from the positions in a welcome. Where that is our own, what we have above it still counts; of
    // another epoch only what the server names.
    for (const [topic, { epoch, pos, known }] of Object.entries({ project: frame, user: frame.user, all: frame.all })) {
      const place = this.#place(topic);
      if (place.epoch !== epoch || place.pos !== pos) place.reset(epoch, pos, known);
    }
    this.#watch();
    this.#become("open");
    this.#emit("welcome", frame);
    this.#drain();
  }

  /** @param {any} frame */
  #batch(frame) {
    const life = this.#life;
    for (const event of frame.events) {
      this.#event(event, event.topic ?? frame.topic);
      if (life !== this.#life) return; // a listener closed us: the rest was not seen
    }
    if (frame.pos !== undefined) this.#place(frame.topic).reach(frame.pos);
  }

  /**
   * Show an event, once; acknowledge it, each time. One that a listener choked on counts as not seen, so that it
   * comes again.
   *
   * @param {RouterEvent} event @param {string} [topic]
   */
  #event(event, topic) {
    const { seq, message_id: id } = event;
    const place = this.#place(topic);
    const seen = (id && this.#messageIds.has(id)) || (seq && !event.redelivered && place.has(seq));
    if (!seen) {
      const shown = [event.type, "*"].map((type) => this.#emit(type, event));
      if (event.requires_ack && shown.includes(false)) return;
      if (seq) place.add(seq);
      if (id) this.#remember(id);
    }
    if (event.requires_ack && id) this.#transmit({ type: "ack", message_id: id });
  }

  /** @param {string} id */
  #remember(id) {
    this.#messageIds.add(id);
    if (this.#messageIds.size > REMEMBERED) this.#messageIds.delete(this.#messageIds.values().next().value ?? "");
  }

  /** @param {string} [topic] */
  #place(topic = "project") {
    return (this.#places[topic] ??= new Place());
  }

  // What goes out

  /** @param {RouterEvent} event */
  #transmit(event) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(event));
  }

  #drain() {
    const event = this.#state === "open" && this.#outbox.shift();
    if (!event) return;
    this.#transmit(event);
    this.#later("outbox", OUTBOX_PACE, () => this.#drain());
  }

  // Small things

  /** @param {ConnectionState} state @param {object} [why] */
  #become(state, why) {
    if (state === this.#state) return;
    this.#state = state;
    this.#emit("state", { type: "state", state, ...why });
  }

  /** Tell the listeners. @param {string} type @param {any} event @returns {boolean} whether none of them threw */
  #emit(type, event) {
    let good = true;
    for (const listener of [...(this.#listeners.get(type) ?? [])]) {
      try {
        listener(event);
      } catch (error) {
        good = false;
        console.error(`RouterClient: a listener for ${type} threw`, error);
      }
    }
    return good;
  }

  /** @param {string} name @param {number} ms @param {() => void} run */
  #later(name, ms, run) {
    this.#stop(name);
    this.#timers[name] = this.#options.setTimeout(run, ms);
  }

  /** @param {string} name */
  #stop(name) {
    this.#options.clearTimeout(this.#timers[name]);
    delete this.#timers[name];
  }
}

// What a page makes of the events

/**
 * @typedef {{ id: string, status: "pending" | "running" | "completed" | "error", progress: number, message?: string,
 *   result?: any, error?: string }} Step
 * @typedef {{ role: string, content: string, user_id?: string, stream_id?: string, streaming: boolean }} Message
 * @typedef {string | null} Stream  the `stream_id` of a text, null for the one without
 * @typedef {{ steps: Record<string, Step>, messages: Message[], people: string[], torn?: Stream[] }} ProjectState
 *   `torn`: texts that go on and whose beginning we were not given
 */

/** A project about which nothing is known yet. @returns {ProjectState} */
export const projectState = () => ({ steps: {}, messages: [], people: [], torn: [] });

/**
 * The project after `event`. Pure: the state that it was given stays as it was.
 *
 * @param {ProjectState} state @param {RouterEvent} event @returns {ProjectState}
 */
export function reduce(state, event) {
  const { step_id: id, user_id: person } = event;
  const step = (/** @type {Partial<Step>} */ change) => {
    const before = state.steps[id] ?? { id, status: "pending", progress: 0 };
    return { ...state, steps: { ...state.steps, [id]: { ...before, ...change } } };
  };
  switch (event.type) {
    case "step_started":
      return step({ status: "running", progress: 0, message: undefined, result: undefined, error: undefined });
    case "step_progress":
      return step({ status: "running", progress: event.progress, message: event.message });
    case "step_completed":
      return step({ status: "completed", progress: 1, result: event.result });
    case "step_error":
      return step({ status: "error", error: event.error });
    case "project_modified":
      return { ...state, steps: changedSteps(state.steps, event.changes ?? {}) };
    case "chat_message": {
      const message = { role: event.role, content: event.content, user_id: person, streaming: false };
      return { ...state, messages: [...state.messages, message] };
    }
    case "chat_response_chunk":
      return withChunk(state, event);
    case "presence_joined":
      return { ...state, people: [...new Set([...state.people, person])].sort() };
    case "presence_left":
      return { ...state, people: state.people.filter((other) => other !== person) };
    default:
      return state;
  }
}

/** @param {Record<string, Step>} steps @param {any} changes @returns {Record<string, Step>} */
function changedSteps(steps, { steps_added: added = [], steps_removed: removed = [] }) {
  const changed = { ...steps };
  for (const id of added) changed[id] ??= { id, status: "pending", progress: 0 };
  for (const id of removed) delete changed[id];
  return changed;
}

/** A piece of an answer belongs to the open answer of its stream; where there is none, it begins one, unless what it
 * begins with is missing. That is so until the end: a server that we move to in between does not know, and says nothing.
 * @param {ProjectState} state @param {RouterEvent} chunk @returns {ProjectState} */
function withChunk(state, { content, stream_id, is_complete, torn: marked }) {
  const { messages, torn = [] } = state;
  const stream = stream_id ?? null;
  const at = messages.findLastIndex((message) => message.streaming && (message.stream_id ?? null) === stream);
  const lacking = Boolean(marked) || torn.includes(stream);
  const others = torn.filter((other) => other !== stream);
  const now = lacking && !is_complete ? [...others, stream] : others;
  if (at < 0 && lacking) return { ...state, torn: now };
  const before = messages[at] ?? { role: "assistant", content: "", stream_id };
  const message = { ...before, content: before.content + content, streaming: !is_complete };
  return { ...state, messages: at < 0 ? [...messages, message] : messages.with(at, message), torn: now };
}

/**
 * A client's project as a store by Svelte's contract (`$project` works), or for anything that can subscribe.
 *
 * After a `resync` of the project it is empty again: load the state from where it is kept, then `set` it. To an answer
 * that is `streaming` in what was set the rest is added; of one that is not there, the rest is not shown either.
 *
 * @param {RouterClient} client
 */
export function store(client) {
  let value = { ...projectState(), connection: client.state };
  /** @type {Set<(value: any) => void>} */
  const subscribers = new Set();
  const update = (/** @type {(value: any) => any} */ change) => {
    value = change(value);
    for (const run of [...subscribers]) run(value);
  };
  client.on("*", (event) => update((state) => reduce(state, event)));
  client.on("state", ({ state }) => update((before) => ({ ...before, connection: state })));
  client.on("resync", ({ topic = "project" }) => {
    if (topic === "project") update((before) => ({ ...before, ...projectState() }));
  });
  return {
    /** @param {(value: ProjectState & { connection: ConnectionState }) => void} run */
    subscribe(run) {
      subscribers.add(run);
      run(value);
      return () => void subscribers.delete(run);
    },
    update,
    // What is torn follows from what came, whatever the page has loaded meanwhile.
    set: (/** @type {any} */ state) =>
      update((before) => ({ ...before, ...state, torn: [...new Set([...(before.torn ?? []), ...(state.torn ?? [])])] })),
  };
}
