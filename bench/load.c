/* Load client: opens many WebSocket connections to one port of 127.0.0.1, reads them with epoll, and times receipts.
 *
 *   load PORT [deflate]          deflate: offer permessage-deflate (RFC 7692) without context takeover
 *
 * Reads commands from stdin and responds to each with a line of JSON; the end of stdin ends it.
 *   open N                       open N more connections, including the handshake
 *   expect COUNT FIRST LIMIT_MS  every connection is to receive messages FIRST .. FIRST+COUNT-1, once and in order:
 *                                responds "expecting" at once, and with counts and latencies when all have arrived or
 *                                LIMIT_MS has passed
 *
 * A message contains MARK, then its number and its CLOCK_MONOTONIC time of sending in ns, 16 hex digits each.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "inflate.h"

#define MARK "b0a7b0a7b0a7b0a7"
#define MARK_SIZE 16
#define READ_SIZE (1 << 20)
#define FRAME_LIMIT (1 << 20)
#define IN_FLIGHT 64 /* concurrent handshakes, fewer than any listen backlog */
#define EVENTS 1024

enum state { CONNECTING, UPGRADING, OPEN, CLOSED };

struct connection {
    int fd;
    enum state state;
    uint64_t next;       /* number of the message expected next */
    unsigned char *rest; /* an incomplete frame */
    size_t have;
};

#define REQUEST                                                                                                        \
    "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"                                \
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
static const char PLAIN_REQUEST[] = REQUEST "\r\n";
static const char DEFLATE_REQUEST[] =
    REQUEST "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n\r\n";
static const char AGREED[] = "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover";
/* The accept value for that key: the example of RFC 6455, 1.3. */
static const char ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

static int poller, port, deflates;
static struct connection **connections;
static size_t made, wanted_open, opened, handshaking, lost;
static double open_began;
static int is_opening;

static int is_expecting;
static uint64_t first, count, target, delivered, duplicates, gaps, strays, received_bytes;
static double deadline;
static uint32_t *latencies_us;                       /* per delivery */
static uint64_t *first_ns, *last_ns;                 /* per message: latency of its first and its last receipt */
static unsigned char buffer[READ_SIZE + FRAME_LIMIT + 16];

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void *allocate(size_t items, size_t size) {
    void *memory = calloc(items ? items : 1, size);
    if (!memory) fail("memory");
    return memory;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double now_s(void) { return (double)now_ns() / 1e9; }

static void connect_next(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct connection *connection = allocate(1, sizeof *connection);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = connection};
    int on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connection->fd < 0) fail("socket");
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail("connect");
    if (epoll_ctl(poller, EPOLL_CTL_ADD, connection->fd, &event)) fail("epoll_ctl");
    connection->next = first;
    connections[made++] = connection;
    handshaking++;
}

static void answer_open(void) {
    is_opening = 0;
    printf("{\"open\": %zu, \"lost\": %zu, \"seconds\": %.6f}\n", opened, lost, now_s() - open_began);
    fflush(stdout);
}

static void go_on_opening(void) {
    while (made < wanted_open && handshaking < IN_FLIGHT) connect_next();
    if (is_opening && made == wanted_open && !handshaking) answer_open();
}

static void lose(struct connection *connection) {
    if (connection->state == CONNECTING || connection->state == UPGRADING) handshaking--;
    if (connection->state == OPEN) opened--;
    connection->state = CLOSED;
    lost++;
    close(connection->fd);
    free(connection->rest);
    connection->rest = NULL;
    go_on_opening();
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t percentile(double part) {
    return delivered ? latencies_us[(size_t)(part * (double)(delivered - 1) + 0.5)] : 0;
}

static void print_times(const char *name, const uint64_t *times) {
    printf(", \"%s\": [", name);
    for (uint64_t i = 0; i < count; i++) printf("%s%.1f", i ? ", " : "", (double)times[i] / 1e3);
    printf("]");
}

static void answer_expect(void) {
    is_expecting = 0;
    qsort(latencies_us, delivered, sizeof *latencies_us, by_value);
    printf("{\"delivered\": %lu, \"wanted\": %lu, \"duplicates\": %lu, \"gaps\": %lu, \"strays\": %lu, ",
           (unsigned long)delivered, (unsigned long)target, (unsigned long)duplicates, (unsigned long)gaps,
           (unsigned long)strays);
    printf("\"bytes\": %lu, ", (unsigned long)received_bytes);
    printf("\"open\": %zu, \"lost\": %zu, \"p50_us\": %u, \"p99_us\": %u, \"max_us\": %u", opened, lost,
           percentile(0.5), percentile(0.99), percentile(1.0));
    print_times("first_us", first_ns);
    print_times("last_us", last_ns);
    printf("}\n");
    fflush(stdout);
}

static void expect(uint64_t new_count, uint64_t new_first, double limit_ms) {
    first = new_first;
    count = new_count;
    target = count * opened;
    delivered = duplicates = gaps = strays = received_bytes = 0;
    free(latencies_us);
    free(first_ns);
    free(last_ns);
    latencies_us = allocate(target, sizeof *latencies_us);
    first_ns = allocate(count, sizeof *first_ns);
    last_ns = allocate(count, sizeof *last_ns);
    for (size_t i = 0; i < made; i++) connections[i]->next = first;
    deadline = now_s() + limit_ms / 1e3;
    is_expecting = 1;
    printf("{\"expecting\": %lu}\n", (unsigned long)target);
    fflush(stdout);
}

static uint64_t hex(const unsigned char *digits) {
    char text[17];
    memcpy(text, digits, 16);
    text[16] = 0;
    return strtoull(text, NULL, 16);
}

static void take_message(struct connection *connection, const unsigned char *payload, size_t size, uint64_t now) {
    const unsigned char *mark = memmem(payload, size, MARK, MARK_SIZE);
    uint64_t number, latency;
    if (!mark || mark + MARK_SIZE + 32 > payload + size) return; /* welcome, status, position */
    number = hex(mark + MARK_SIZE);
    if (number >= first + count || !is_expecting) {
        strays++;
        return;
    }
    if (number < connection->next) {
        duplicates++;
        return;
    }
    gaps += number - connection->next;
    connection->next = number + 1;
    latency = now - hex(mark + MARK_SIZE + 16);
    if (delivered >= target) {
        strays++; /* a connection that was opened meanwhile */
        return;
    }
    latencies_us[delivered++] = (uint32_t)(latency / 1000);
    number -= first;
    if (!first_ns[number] || latency < first_ns[number]) first_ns[number] = latency;
    if (latency > last_ns[number]) last_ns[number] = latency;
}

/* All clients get the same bytes, so this message is most likely the same as the previous one. */
static void take_compressed(struct connection *connection, const unsigned char *payload, size_t size, uint64_t now) {
    static unsigned char last[FRAME_LIMIT], message[FRAME_LIMIT];
    static size_t last_size;
    static ptrdiff_t message_size;
    if (size != last_size || memcmp(payload, last, size)) {
        memcpy(last, payload, size);
        memcpy(last + size, "\0\0\xff\xff", 4); /* removed by the sender (RFC 7692) */
        last_size = size;
        message_size = inflate_all(last, size + 4, message, sizeof message);
    }
    if (message_size < 0)
        strays++;
    else
        take_message(connection, message, (size_t)message_size, now);
}

static int pong(struct connection *connection, const unsigned char *payload, size_t size) {
    unsigned char frame[6 + 125] = {0x8a, (unsigned char)(0x80 | size), 0, 0, 0, 0}; /* masked with zeros */
    memcpy(frame + 6, payload, size);
    return send(connection->fd, frame, 6 + size, MSG_NOSIGNAL) == (ssize_t)(6 + size);
}

/* Processes the complete frames of `data`. Returns their number of bytes, or -1 to close the connection. */
static ssize_t take_frames(struct connection *connection, const unsigned char *data, size_t size, uint64_t now) {
    size_t at = 0;
    while (size - at >= 2) {
        const unsigned char *frame = data + at;
        size_t header = 2, length = frame[1] & 0x7f;
        if (frame[1] & 0x80 || frame[0] & 0x30 || !(frame[0] & 0x80)) return -1; /* masked, extended, fragmented */
        if (frame[0] & 0x40 && (!deflates || (frame[0] & 0x0f) != 1)) return -1; /* compressed */
        if (length == 126) {
            if (size - at < 4) break;
            header = 4;
            length = (size_t)frame[2] << 8 | frame[3];
        } else if (length == 127) {
            return -1; /* no message of these servers is that long */
        }
        if (size - at < header + length) break;
        switch (frame[0] & 0x0f) {
        case 1:
            if (is_expecting) received_bytes += header + length;
            (frame[0] & 0x40 ? take_compressed : take_message)(connection, frame + header, length, now);
            break;
        case 9:
            if (!pong(connection, frame + header, length)) return -1;
            break;
        case 10: break;
        default: return -1;
        }
        at += header + length;
    }
    return (ssize_t)at;
}

/* Returns the size of the handshake's response, 0 if it is incomplete, -1 if it is a refusal. */
static ssize_t take_answer(const unsigned char *data, size_t size) {
    const unsigned char *end = memmem(data, size, "\r\n\r\n", 4);
    if (!end) return size < 4096 ? 0 : -1;
    size = (size_t)(end + 4 - data);
    if (memcmp(data, "HTTP/1.1 101", 12) || !memmem(data, size, ACCEPT, sizeof ACCEPT - 1)) return -1;
    if (deflates && !memmem(data, size, AGREED, sizeof AGREED - 1)) return -1;
    return (ssize_t)size;
}

static void receive(struct connection *connection) {
    size_t size = connection->have;
    unsigned char *data = buffer;
    ssize_t taken;
    uint64_t now;
    if (size) memcpy(data, connection->rest, size);
    taken = recv(connection->fd, data + size, READ_SIZE, 0);
    now = now_ns();
    if (taken < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (taken <= 0) {
        lose(connection);
        return;
    }
    size += (size_t)taken;
    if (connection->state == UPGRADING) {
        taken = take_answer(data, size);
        if (taken < 0) {
            lose(connection);
            return;
        }
        if (taken) {
            connection->state = OPEN;
            handshaking--;
            opened++;
            data += taken;
            size -= (size_t)taken;
        }
    }
    if (connection->state == OPEN) {
        taken = take_frames(connection, data, size, now);
        if (taken < 0) {
            lose(connection);
            return;
        }
        data += taken;
        size -= (size_t)taken;
    }
    if (size > FRAME_LIMIT) {
        lose(connection);
        return;
    }
    if (size) {
        connection->rest = realloc(connection->rest, size);
        if (!connection->rest) fail("memory");
        memcpy(connection->rest, data, size);
    }
    connection->have = size;
}

static void connected(struct connection *connection) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    const char *request = deflates ? DEFLATE_REQUEST : PLAIN_REQUEST;
    if (send(connection->fd, request, strlen(request), MSG_NOSIGNAL) != (ssize_t)strlen(request)) {
        lose(connection);
        return;
    }
    connection->state = UPGRADING;
    epoll_ctl(poller, EPOLL_CTL_MOD, connection->fd, &event);
}

static void command(void) {
    char line[128];
    unsigned long a, b;
    double limit_ms;
    ssize_t size = read(0, line, sizeof line - 1); /* one command: the next one is sent only after the response */
    if (size <= 0) exit(0);
    line[size] = 0;
    if (sscanf(line, "open %lu", &a) == 1) {
        open_began = now_s();
        is_opening = 1;
        wanted_open += a;
        connections = realloc(connections, wanted_open * sizeof *connections);
        if (!connections) fail("memory");
        go_on_opening();
    } else if (sscanf(line, "expect %lu %lu %lf", &a, &b, &limit_ms) == 3) {
        expect(a, b, limit_ms);
    } else {
        errno = EINVAL;
        fail(line);
    }
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS], input = {.events = EPOLLIN, .data.ptr = NULL};
    deflates = argc == 3 && !strcmp(argv[2], "deflate");
    if (argc != 2 + deflates || !(port = atoi(argv[1]))) {
        fprintf(stderr, "usage: load PORT [deflate]\n");
        return 2;
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, 0, &input)) fail("epoll");
    for (;;) {
        int ready = epoll_wait(poller, events, EVENTS, is_expecting ? 20 : 1000);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *connection = events[i].data.ptr;
            if (!connection)
                command();
            else if (connection->state == CONNECTING && events[i].events & EPOLLOUT)
                connected(connection);
            else if (connection->state == CONNECTING)
                lose(connection);
            else if (connection->state != CLOSED)
                receive(connection);
        }
        go_on_opening();
        if (is_expecting && (delivered >= target || now_s() > deadline)) answer_expect();
    }
}
