// A client that does what the specification's JavaScript class does and no more: the token in the query, one JSON
// object a frame, a switch on `type`, backoff that gives up after five attempts. It knows nothing of this project.
class SpecifiedClient {
  constructor(origin, project, token) {
    Object.assign(this, { origin, project, token, socket: null, attempts: 0, limit: 5, opened: 0, seen: [], unknown: [] });
  }

  connect() {
    this.socket = new WebSocket(`${this.origin}/ws/project/${this.project}?token=${this.token}`);
    this.socket.onopen = () => {
      this.opened += 1;
      this.attempts = 0;
    };
    this.socket.onmessage = (event) => this.handle(JSON.parse(event.data));
    this.socket.onclose = () => this.reconnect();
  }

  reconnect() {
    if (this.attempts >= this.limit) return;
    this.attempts += 1;
    setTimeout(() => this.connect(), Math.min(1000 * 2 ** this.attempts, 30000));
  }

  handle(message) {
    switch (message.type) {
      case "step_started":
      case "step_progress":
      case "step_completed":
      case "step_error":
      case "chat_message":
      case "chat_response_chunk":
      case "project_modified":
        this.seen.push(message);
        break;
      case "ping":
        break;
      default:
        this.unknown.push(message);
    }
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }
}
