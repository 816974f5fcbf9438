/* The limit: a server that only calls send() with the same frame on every socket.
 *
 *   limit FRAME        FRAME: a file with a complete WebSocket frame that contains MARK
 *
 * Prints its port. Reads commands from stdin and responds to each with a line of JSON; the end of stdin ends it.
 *   publish COUNT FIRST RATE   send messages FIRST .. FIRST+COUNT-1 at RATE per second
 *   usage                      CPU microseconds so far, user and system, and connections
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MARK "b0a7b0a7b0a7b0a7"
#define MARK_SIZE 16
#define EVENTS 256

/* The response to the only key that the load client sends: the example of RFC 6455, 1.3. */
static const char RESPONSE[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                               "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static int poller, listener;
static int *clients;
static size_t clients_open, clients_room;
static unsigned char frame[1 << 16];
static size_t frame_size;
static unsigned char *mark;

static void fail(const char *what) {
    fprintf(stderr, "limit: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void read_frame(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path);
    frame_size = fread(frame, 1, sizeof frame, file);
    fclose(file);
    mark = memmem(frame, frame_size, MARK, MARK_SIZE);
    if (!mark || mark + MARK_SIZE + 32 > frame + frame_size) {
        errno = EINVAL;
        fail("no mark in the frame");
    }
}

static void listen_on_loopback(void) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct epoll_event event = {.events = EPOLLIN};
    socklen_t size = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    event.data.fd = listener;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096) ||
        getsockname(listener, (struct sockaddr *)&address, &size) ||
        epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event))
        fail("listen");
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);
}

static void accept_clients(void) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
    }
    if (errno != EAGAIN) fail("accept");
}

static void leave(int fd) {
    for (size_t i = 0; i < clients_open; i++)
        if (clients[i] == fd) {
            clients[i] = clients[--clients_open];
            break;
        }
    close(fd);
}

/* The only thing a client sends is its request, which fits into one segment. */
static void receive_request(int fd) {
    char text[4096];
    ssize_t size = recv(fd, text, sizeof text, 0);
    if (size <= 0) {
        leave(fd);
        return;
    }
    if (!memmem(text, (size_t)size, "\r\n\r\n", 4)) return;
    if (send(fd, RESPONSE, sizeof RESPONSE - 1, MSG_NOSIGNAL) != sizeof RESPONSE - 1) fail("handshake");
    if (clients_open == clients_room) {
        clients_room = clients_room ? 2 * clients_room : 1024;
        clients = realloc(clients, clients_room * sizeof *clients);
        if (!clients) fail("memory");
    }
    clients[clients_open++] = fd;
}

static void send_to(int fd) {
    size_t sent = 0;
    while (sent < frame_size) {
        ssize_t part = send(fd, frame + sent, frame_size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (part >= 0) {
            sent += (size_t)part;
        } else if (errno == EAGAIN) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, 1000);
        } else {
            return; /* the load client detects missing messages */
        }
    }
}

static void publish(unsigned long count, unsigned long first, double rate) {
    struct timespec next;
    char stamp[33];
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (unsigned long i = 0; i < count; i++) {
        struct timespec now;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        snprintf(stamp, sizeof stamp, "%016lx%016lx", first + i,
                 (unsigned long)now.tv_sec * 1000000000ul + (unsigned long)now.tv_nsec);
        memcpy(mark + MARK_SIZE, stamp, 32);
        for (size_t c = 0; c < clients_open; c++) send_to(clients[c]);
        next.tv_nsec += (long)(1e9 / rate);
        while (next.tv_nsec >= 1000000000L) {
            next.tv_nsec -= 1000000000L;
            next.tv_sec++;
        }
    }
    printf("{\"published\": %lu}\n", count);
}

static double microseconds(struct timeval time) { return (double)time.tv_sec * 1e6 + (double)time.tv_usec; }

static void command(void) {
    char line[128];
    unsigned long count, first;
    double rate;
    ssize_t size = read(0, line, sizeof line - 1); /* one command: the next one is sent only after the response */
    if (size <= 0) exit(0);
    line[size] = 0;
    if (sscanf(line, "publish %lu %lu %lf", &count, &first, &rate) == 3) {
        publish(count, first, rate);
    } else if (!strncmp(line, "usage", 5)) {
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        printf("{\"user_us\": %.0f, \"system_us\": %.0f, \"clients\": %zu}\n", microseconds(usage.ru_utime),
               microseconds(usage.ru_stime), clients_open);
    } else {
        errno = EINVAL;
        fail(line);
    }
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct epoll_event events[EVENTS], input = {.events = EPOLLIN, .data.fd = 0};
    if (argc != 2) {
        fprintf(stderr, "usage: limit FRAME\n");
        return 2;
    }
    read_frame(argv[1]);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, 0, &input)) fail("epoll");
    listen_on_loopback();
    for (;;) {
        int ready = epoll_wait(poller, events, EVENTS, -1);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == 0)
                command();
            else if (events[i].data.fd == listener)
                accept_clients();
            else
                receive_request(events[i].data.fd);
        }
    }
}
