// @ts-check
/** The demo page: two people look at one project. Everything that is live about it comes through two RouterClients. */

import { RouterClient, reduce, store } from "/client/router.js";

const PROJECT = "demo";
const VIEWERS = ["ada", "grace"];
/** So many received events are listed. */
const LISTED = 50;
const TOAST_STAYS = 8_000;
const TOASTS = 3;

/** What the form suggests for each type. */
const EXAMPLES = {
  step_started: { step_id: "s4" },
  step_progress: { step_id: "s4", progress: 0.45, message: "Processing chunk 45/100" },
  step_completed: { step_id: "s4", result: { row_count: 1500, columns: ["id", "name", "value"] } },
  step_error: { step_id: "s4", error: "Database connection failed" },
  chat_message: { role: "user", content: "Show me top customers by revenue" },
  chat_response_chunk: { content: "Here are the top customers…", is_complete: true },
  project_modified: { user_id: "ada", changes: { steps_added: ["s5"], steps_removed: [], dataflows_added: [] } },
  notification: { level: "info", title: "Nightly import", message: "1,500 rows are new since yesterday." },
};

/** @param {string} selector @param {ParentNode} [within] @returns {any} */
const find = (selector, within = document) => within.querySelector(selector);

/** @param {string} tag @param {Record<string, any>} [fields] @param {...(Node | string)} children */
function element(tag, fields = {}, ...children) {
  const { data = {}, ...rest } = fields;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

/** Set it only where it differs, so that nothing flickers and no animation starts anew.
 * @param {any} on @param {string} name @param {any} value */
function set(on, name, value) {
  if (on[name] !== value) on[name] = value;
}

/**
 * Make the children of `list` stand for `items`: the child that stands for a key is kept.
 *
 * @template T
 * @param {Element} list @param {Map<string, T>} items
 * @param {(item: T, key: string) => Element} make @param {(child: any, item: T) => void} update
 */
function show(list, items, make, update) {
  const before = new Map([...list.children].map((child) => [/** @type {any} */ (child).dataset.key, child]));
  for (const [key, child] of before) if (!items.has(key)) child.remove();
  let at = 0;
  for (const [key, item] of items) {
    const child = before.get(key) ?? make(item, key);
    /** @type {any} */ (child).dataset.key = key;
    if (list.children[at] !== child) list.insertBefore(child, list.children[at] ?? null);
    update(child, item);
    at += 1;
  }
}

const capital = (/** @type {string} */ name) => name.charAt(0).toUpperCase() + name.slice(1);

/** Where the router is: this page's own host, or all nodes of several. @type {string[]} */
const { nodes } = await (await fetch("/demo/nodes")).json();
const several = nodes.length > 1;
const NODES = several ? nodes : [location.origin];
const host = (/** @type {string} */ node) => new URL(node).host;

/** Ask a node; while one does not answer, the next. @param {string} node @param {string} path @param {RequestInit} [options] */
async function ask(node, path, options) {
  const first = NODES.indexOf(node);
  const others = [...NODES.slice(first + 1), ...NODES.slice(0, first)];
  try {
    return await fetch(node + path, options);
  } catch (error) {
    for (const other of others) {
      const answer = await fetch(other + path, options).catch(() => undefined);
      if (answer) return answer;
    }
    throw error;
  }
}

/** @param {string} node @param {string} user */
async function fetchToken(node, user) {
  const answer = await ask(node, `/demo/token?user=${encodeURIComponent(user)}`);
  if (!answer.ok) throw new Error(`no token: HTTP ${answer.status}`);
  return (await answer.json()).token;
}

/** A network cable: while it is unplugged nothing connects, and what was connected is cut. */
class Cable {
  plugged = true;
  /** @type {WebSocket | undefined} */
  #socket;

  /** What a RouterClient takes for WebSocket. @returns {any} */
  get WebSocket() {
    const cable = this;
    return function (/** @type {string} */ url, /** @type {string[]} */ protocols) {
      if (!cable.plugged) throw new Error("the cable is unplugged");
      return (cable.#socket = new WebSocket(url, protocols));
    };
  }

  toggle() {
    this.plugged = !this.plugged;
    if (this.plugged) window.dispatchEvent(new Event("online"));
    else this.#socket?.close(4999, "unplugged");
  }
}

class Viewer {
  #token = "";
  #cable = new Cable();
  #count = 0;
  /** The node that it was welcome at last. */
  #home = "";

  /** @param {string} user @param {string} node */
  constructor(user, node) {
    this.user = user;
    this.node = node;
    this.pane = find("[data-viewer-template]").content.firstElementChild.cloneNode(true);
    this.pane.dataset.viewer = user;
    find("[data-node]", this.pane).textContent = host(node);
    find("[data-name]", this.pane).textContent = capital(user);
    find("[data-avatar]", this.pane).textContent = capital(user).charAt(0);
    find("[data-viewers]").append(this.pane);

    this.client = new RouterClient({
      project: PROJECT,
      url: () => this.node,
      token: async () => (this.#token = await fetchToken(this.node, user)),
      since: 0, // so that a page that was just loaded shows what is going on
      WebSocket: this.#cable.WebSocket,
    });
    this.store = store(this.client);
    this.store.subscribe((state) => this.#render(state));
    this.client.on("*", (event) => this.#list(event));
    this.client.on("notification", ({ level, title, message }) => this.toast(level, title, message));
    this.client.on("resync", ({ reason, topic }) => {
      if (topic) return;
      // Nothing keeps the demo's state but the router, so there is nothing to load; what comes is all there is.
      if (this.#count) this.toast("warning", "What was missed is gone", `${reason}: this pane begins anew.`);
      else this.toast("info", "What was before is gone", `${reason}: this pane begins with what there is.`);
      void this.#whoIsHere(); // the store has forgotten them
    });
    this.client.on("error", ({ message }) => this.toast("alert", "Declined", message));
    this.client.on("state", ({ state, reason }) => {
      if (state === "closed") this.toast("alert", "Connection closed", reason);
      if (state === "waiting" && this.#cable.plugged) this.#moveOn();
    });
    this.client.on("welcome", ({ recovered }) => {
      if (this.#home && this.#home !== this.node && recovered) {
        this.toast("info", `Moved to ${host(this.node)}`, "Nothing was missed.");
      }
      this.#home = this.node;
      void this.#whoIsHere();
    });

    find("[data-where]", this.pane).hidden = !several;
    find("[data-stop]", this.pane).onclick = () => this.#stop();
    find("[data-drop]", this.pane).onclick = () => this.#drop();
    find("[data-say]", this.pane).onsubmit = (/** @type {SubmitEvent} */ event) => this.#say(event);
    this.client.connect();
  }

  /** The token of this person, for HTTP. */
  async bearer() {
    return { Authorization: `Bearer ${this.#token || (await fetchToken(this.node, this.user))}` };
  }

  /** The node is lost: try the next one. */
  #moveOn() {
    this.node = NODES[(NODES.indexOf(this.node) + 1) % NODES.length];
    find("[data-node]", this.pane).textContent = host(this.node);
  }

  /** End the node that this viewer is on. */
  async #stop() {
    try {
      const answer = await fetch(`${this.node}/demo/stop`, { method: "POST" });
      if (!answer.ok) this.toast("alert", "The node was not stopped", `HTTP ${answer.status}`);
    } catch {
      this.toast("alert", "The node was not stopped", "It does not answer.");
    }
  }

  async #whoIsHere() {
    // Whoever comes or goes while the answer is on its way may be missing in it.
    /** @type {any[]} */
    const meanwhile = [];
    const types = ["presence_joined", "presence_left"];
    const stops = types.map((type) => this.client.on(type, (event) => meanwhile.push(event)));
    try {
      const answer = await ask(this.node, `/projects/${PROJECT}/presence`, { headers: await this.bearer() });
      if (!answer.ok) return;
      const { users } = await answer.json();
      const people = users.map((/** @type {any} */ { user_id }) => user_id).sort();
      this.store.update((state) => meanwhile.reduce(reduce, { ...state, people }));
    } finally {
      for (const stop of stops) stop();
    }
  }

  #drop() {
    this.#cable.toggle();
    const button = find("[data-drop]", this.pane);
    button.ariaPressed = String(!this.#cable.plugged);
    button.textContent = this.#cable.plugged ? "Drop connection" : "Reconnect";
  }

  /** @param {SubmitEvent} submit */
  #say(submit) {
    submit.preventDefault();
    const form = /** @type {any} */ (submit.target);
    try {
      this.client.send({ type: "chat_message", role: "user", content: form.text.value });
      form.reset();
    } catch (error) {
      this.toast("alert", "Not sent", String(error));
    }
  }

  /** @param {any} state */
  #render({ connection, people, steps, messages }) {
    const pill = find("[data-state]", this.pane);
    set(pill, "textContent", connection);
    pill.dataset.state = connection;
    set(find("[data-stop]", this.pane), "disabled", connection !== "open");

    show(
      find("[data-people]", this.pane),
      new Map(people.map((/** @type {string} */ person) => [person, person])),
      (person) => element("li", { textContent: capital(person), data: { person } }),
      () => {},
    );
    show(find("[data-steps]", this.pane), new Map(Object.entries(steps)), makeStep, updateStep);

    const chat = find("[data-chat]", this.pane);
    const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    const numbered = messages.map((/** @type {any} */ message, /** @type {number} */ n) => [`${n}`, message]);
    show(chat, new Map(numbered), makeMessage, updateMessage);
    if (atEnd) chat.scrollTop = chat.scrollHeight;
  }

  /** @param {any} event */
  #list(event) {
    const { type, seq, topic, ...rest } = event;
    const number = seq === undefined ? "–" : `${topic ? `${topic} ` : ""}${seq}`;
    const cells = [number, type, JSON.stringify(rest)].map((text) => element("span", { textContent: text, title: text }));
    const list = find("[data-events]", this.pane);
    list.prepend(element("li", {}, ...cells));
    while (list.children.length > LISTED) list.lastElementChild.remove();
    find("[data-count]", this.pane).textContent = String((this.#count += 1));
    // The position moves after its events were shown.
    queueMicrotask(() => {
      const [, pos, above] = this.client.since.split(",")[0].split(":");
      const ahead = above ? `, and ${above.split(".").length} beyond` : "";
      find("[data-place]", this.pane).textContent = `position ${pos}${ahead}`;
    });
  }

  /** @param {string} level @param {string} title @param {string} message */
  toast(level, title, message) {
    const toast = element(
      "div",
      { className: "toast", data: { toast: level } },
      element("strong", { textContent: title }),
      element("p", { textContent: message }),
    );
    toast.onclick = () => toast.remove();
    const toasts = find("[data-toasts]", this.pane);
    toasts.prepend(toast);
    toasts.children[TOASTS]?.remove();
    setTimeout(() => toast.remove(), TOAST_STAYS);
  }
}

/** @param {any} step */
function makeStep({ id }) {
  return element(
    "li",
    { data: { step: id } },
    element("span", { className: "mark" }),
    element("b", { textContent: id }),
    element("span", { className: "note" }),
    element("span", { className: "percent" }),
    element("span", { className: "bar", role: "progressbar" }, element("i")),
  );
}

/** @param {any} row @param {any} step */
function updateStep(row, { id, status, progress, message, result, error }) {
  row.dataset.status = status;
  const percent = Math.round(100 * progress);
  const rows = result?.row_count === undefined ? "done" : `${result.row_count.toLocaleString("en")} rows`;
  /** @type {Record<string, string>} */
  const notes = { pending: "waits", running: message ?? "running", completed: rows, error };
  const note = notes[status];
  set(find(".note", row), "textContent", note);
  find(".note", row).title = note;
  set(find(".percent", row), "textContent", status === "running" ? `${percent} %` : "");
  const bar = find(".bar", row);
  bar.ariaLabel = id;
  bar.ariaValueNow = String(percent);
  set(bar.firstElementChild.style, "width", `${percent}%`);
}

/** @param {any} message */
function makeMessage({ role, user_id }) {
  const answer = role === "assistant";
  const who = answer ? "Assistant" : user_id ? capital(user_id) : "Somebody";
  const mark = answer ? { answer: "" } : { message: user_id ?? "" };
  return element(
    "li",
    { className: answer ? "answer" : "said" },
    element("b", { textContent: who }),
    element("p", { data: mark }),
  );
}

/** @param {any} row @param {any} message */
function updateMessage(row, { content, streaming }) {
  row.classList.toggle("streaming", streaming);
  const text = find("p", row);
  set(text, "textContent", content);
  if ("answer" in text.dataset) text.dataset.answer = streaming ? "streaming" : "complete";
}

// The two of them, and what a backend would do

const viewers = VIEWERS.map((user, index) => new Viewer(user, NODES[index % NODES.length]));
find("[data-several]").hidden = !several;
find("[data-single]").hidden = several;

const run = find("[data-run]");
run.onclick = async () => {
  run.disabled = true;
  try {
    // All nodes run it, and publish each event under the same id: the run goes on as long as one of them does.
    const path = `/demo/run?name=${crypto.randomUUID()}`;
    const answers = await Promise.allSettled(NODES.map((node) => fetch(node + path, { method: "POST" })));
    const runs = answers.some((answer) => answer.status === "fulfilled" && answer.value.ok);
    if (!runs) viewers[0].toast("alert", "The project did not run", "No node took it.");
  } finally {
    run.disabled = false;
  }
};

const form = find("[data-publish]");
const suggest = () => {
  const type = /** @type {keyof typeof EXAMPLES} */ (form.type.value);
  form.event.value = JSON.stringify({ type, ...EXAMPLES[type] }, null, 2);
};
form.type.append(...Object.keys(EXAMPLES).map((type) => element("option", { textContent: type })));
form.type.value = "notification";
form.type.onchange = suggest;
suggest();

form.onsubmit = async (/** @type {SubmitEvent} */ submit) => {
  submit.preventDefault();
  const output = find("[data-publish-answer]");
  const tell = (/** @type {boolean} */ good, /** @type {string} */ text) => {
    output.dataset.publishAnswer = good ? "accepted" : "refused";
    output.textContent = text;
  };
  try {
    JSON.parse(form.event.value);
  } catch (error) {
    return tell(false, `not JSON: ${/** @type {Error} */ (error).message}`);
  }
  const headers = { ...(await viewers[0].bearer()), "Content-Type": "application/json" };
  const path = `/projects/${PROJECT}/events`;
  const answer = await ask(viewers[0].node, path, { method: "POST", headers, body: form.event.value });
  const said = await answer.json();
  if (answer.ok) tell(true, `${answer.status} · seq ${said.seq.join(", ")}`);
  else tell(false, `${answer.status} · ${said.title}${said.detail ? `: ${said.detail}` : ""}`);
};
