/* climit - what the kernel allows: a WebSocket server that does nothing but one send() of a
 * pre-built frame per connection.
 *
 *   climit PORT     /ws: broadcast; /sink: one acknowledgement for 100 messages; other paths: echo
 *
 * Build: gcc -O2 -Wall -Wextra -o climit climit.c
 * It trusts its client (no validation, small frames only): a yardstick, not a server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_CONNS 20000
#define WS_ACCEPT_RESPONSE \
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" \
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n" /* wsload's constant key */

#define ACK "{\"t\":0}" /* wsload counts a frame that holds "t": and takes no latency from 0 */

struct conn { int fd, index; char kind; uint32_t len, count; uint8_t buf[8192]; };

static struct conn *room[MAX_CONNS];
static int room_size, epfd;

static void drop(struct conn *c) {
    if (c->index >= 0) {
        room[c->index] = room[--room_size];
        room[c->index]->index = c->index;
    }
    close(c->fd);
    free(c);
}

static size_t frame(uint8_t *out, const uint8_t *payload, size_t n) {
    size_t h = 0;
    out[h++] = 0x81;
    if (n < 126) out[h++] = (uint8_t)n;
    else { out[h++] = 126; out[h++] = (uint8_t)(n >> 8); out[h++] = (uint8_t)n; }
    memcpy(out + h, payload, n);
    return h + n;
}

static void broadcast(const uint8_t *payload, size_t n) {
    static uint8_t out[16384];
    size_t len = frame(out, payload, n);
    for (int i = 0; i < room_size; i++) send(room[i]->fd, out, len, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static bool on_input(struct conn *c) {
    ssize_t n = recv(c->fd, c->buf + c->len, sizeof c->buf - c->len, MSG_DONTWAIT);
    if (n <= 0) return n < 0 && errno == EAGAIN;
    c->len += (uint32_t)n;
    uint32_t pos = 0;
    if (!c->kind) {
        uint8_t *end = memmem(c->buf, c->len, "\r\n\r\n", 4);
        if (!end) return true;
        c->kind = !memcmp(c->buf, "GET /ws", 7) ? 'b' : !memcmp(c->buf, "GET /sink", 9) ? 's' : 'e';
        send(c->fd, WS_ACCEPT_RESPONSE, sizeof WS_ACCEPT_RESPONSE - 1, MSG_NOSIGNAL);
        if (c->kind == 'b') { c->index = room_size; room[room_size++] = c; }
        pos = (uint32_t)(end + 4 - c->buf);
    }
    while (c->len - pos >= 6) {
        uint8_t *b = c->buf + pos;
        size_t head = 2, size = b[1] & 0x7f;
        if (size == 126) { head = 4; size = (size_t)b[2] << 8 | b[3]; }
        if (c->len - pos < head + 4 + size) break;
        uint8_t *mask = b + head, *p = mask + 4;
        for (size_t i = 0; i < size; i++) p[i] ^= mask[i & 3];
        if ((b[0] & 15) == 8) return false;
        if ((b[0] & 15) == 1) {
            uint8_t out[8300];
            if (c->kind == 'b') broadcast(p, size);
            else if (c->kind == 'e') send(c->fd, out, frame(out, p, size), MSG_NOSIGNAL);
            else if (++c->count % 100 == 0) send(c->fd, out, frame(out, (const uint8_t *)ACK, sizeof ACK - 1), MSG_NOSIGNAL);
        }
        pos += (uint32_t)(head + 4 + size);
    }
    memmove(c->buf, c->buf + pos, c->len - pos);
    c->len -= pos;
    return true;
}

int main(int argc, char **argv) {
    int port = argc > 1 ? atoi(argv[1]) : 8000, one = 1;
    struct rlimit rl;
    getrlimit(RLIMIT_NOFILE, &rl);
    rl.rlim_cur = rl.rlim_max;
    setrlimit(RLIMIT_NOFILE, &rl);
    int lfd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(lfd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(lfd, (struct sockaddr *)&a, sizeof a) || listen(lfd, 4096)) { perror("listen"); return 1; }
    epfd = epoll_create1(0);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL}, evs[512];
    epoll_ctl(epfd, EPOLL_CTL_ADD, lfd, &ev);
    for (;;) {
        int n = epoll_wait(epfd, evs, 512, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = evs[i].data.ptr;
            if (c) {
                if (!on_input(c)) drop(c);
                continue;
            }
            int fd = accept4(lfd, NULL, NULL, SOCK_NONBLOCK);
            if (fd < 0) continue;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            c = calloc(1, sizeof *c);
            c->fd = fd;
            c->index = -1;
            ev.events = EPOLLIN;
            ev.data.ptr = c;
            epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &ev);
        }
    }
}
