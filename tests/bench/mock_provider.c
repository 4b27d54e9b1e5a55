/* A mock chat provider that answers at once, or with one chunk every PACE ms; faster than a gateway.
 *
 *   mock_provider PORT     port 0 picks one; the line "listening PORT" says which
 *
 * POST /pace/MS/v1/chat/completions, HTTP/1.1 with keep-alive. A body with "stream":true gets CHUNKS
 * server-sent events, any other one JSON object. One thread, epoll, loopback only.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNKS = 64, MAX_CONNECTIONS = 4096, MAX_REQUEST = 1 << 16, MAX_EVENTS = 256 };

#define HEAD "\"id\":\"chatcmpl-0\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"mock\""
static const char EVENT[] = "data: {" HEAD ",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"word \"},"
                            "\"finish_reason\":null}]}\n\n";
static const char LAST[] = "data: {" HEAD ",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
                           "data: {" HEAD ",\"choices\":[],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":64,"
                           "\"total_tokens\":72}}\n\ndata: [DONE]\n\n";
static const char UNARY[] = "{\"id\":\"chatcmpl-0\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"mock\","
                            "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"word word\"},"
                            "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":2,"
                            "\"total_tokens\":10}}";
static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                  "transfer-encoding: chunked\r\n\r\n";

struct connection {
  int used, received, sent_chunks, pace_ms;
  long long due_ns; /* when the next chunk goes out; 0: no stream is running */
  char request[MAX_REQUEST];
};

static struct connection *connections[MAX_CONNECTIONS];
static int epoll_fd;

static long long now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void drop(int fd) {
  connections[fd]->used = 0;
  close(fd);
}

/* Answers are far smaller than a socket's buffer; a peer that does not read is dropped. */
static int put(int fd, const char *data, size_t size) {
  return send(fd, data, size, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

static size_t chunk(char *out, const char *data) {
  return (size_t)sprintf(out, "%zx\r\n%s\r\n", strlen(data), data);
}

static int put_whole_stream(int fd) {
  static char all[1 << 16];
  static size_t size;
  if (size == 0) {
    size = (size_t)sprintf(all, "%s", STREAM_HEAD);
    for (int i = 0; i < CHUNKS; i++) size += chunk(all + size, EVENT);
    size += chunk(all + size, LAST);
    size += (size_t)sprintf(all + size, "0\r\n\r\n");
  }
  return put(fd, all, size);
}

static int put_next_chunk(int fd, struct connection *c) {
  char out[2048];
  size_t size = chunk(out, EVENT);
  if (++c->sent_chunks < CHUNKS) {
    c->due_ns += c->pace_ms * 1000000LL;
  } else {
    size += chunk(out + size, LAST);
    size += (size_t)sprintf(out + size, "0\r\n\r\n");
    c->due_ns = 0;
  }
  return put(fd, out, size);
}

static int answer(int fd, struct connection *c, const char *body) {
  const char *pace = strstr(c->request, "/pace/");
  c->pace_ms = pace != NULL && pace < body ? atoi(pace + 6) : 0;
  if (strstr(body, "\"stream\":true") == NULL && strstr(body, "\"stream\": true") == NULL) {
    char out[1024];
    return put(fd, out, (size_t)sprintf(out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                                        "content-length: %zu\r\n\r\n%s", sizeof UNARY - 1, UNARY));
  }
  if (c->pace_ms == 0) return put_whole_stream(fd);
  c->sent_chunks = 0;
  c->due_ns = now_ns() + c->pace_ms * 1000000LL;
  return put(fd, STREAM_HEAD, sizeof STREAM_HEAD - 1);
}

static void read_requests(int fd, struct connection *c) {
  ssize_t got = recv(fd, c->request + c->received, (size_t)(MAX_REQUEST - 1 - c->received), 0);
  if (got <= 0) {
    if (got == 0 || (errno != EAGAIN && errno != EINTR)) drop(fd);
    return;
  }
  c->received += (int)got;
  c->request[c->received] = 0;
  char *end = strstr(c->request, "\r\n\r\n");
  if (end == NULL) return;
  const char *length = strcasestr(c->request, "content-length:");
  int head = (int)(end + 4 - c->request), whole = head + (length != NULL ? atoi(length + 15) : 0);
  if (whole >= MAX_REQUEST) { drop(fd); return; }
  if (c->received < whole) return;
  if (answer(fd, c, end + 4) < 0) { drop(fd); return; }
  c->received = 0; /* clients here do not pipeline */
}

static void accept_all(int listener) {
  int fd;
  while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    if (fd >= MAX_CONNECTIONS) { close(fd); continue; }
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connections[fd] == NULL) connections[fd] = malloc(sizeof *connections[fd]);
    if (connections[fd] == NULL) exit(1);
    *connections[fd] = (struct connection){.used = 1};
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
  }
}

static int send_due(void) { /* returns ms until the next chunk is due, -1 if none is */
  long long now = now_ns(), next = 0;
  for (int fd = 0; fd < MAX_CONNECTIONS; fd++) {
    struct connection *c = connections[fd];
    if (c == NULL || !c->used || c->due_ns == 0) continue;
    if (c->due_ns <= now && put_next_chunk(fd, c) < 0) { drop(fd); continue; }
    if (c->due_ns != 0 && (next == 0 || c->due_ns < next)) next = c->due_ns;
  }
  if (next == 0) return -1;
  return next <= now ? 0 : (int)((next - now) / 1000000) + 1;
}

int main(int argc, char **argv) {
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)(argc > 1 ? atoi(argv[1]) : 0)),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof address;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1024) < 0) return 1;
  getsockname(listener, (struct sockaddr *)&address, &size);
  printf("listening %d\n", ntohs(address.sin_port));
  fflush(stdout);
  epoll_fd = epoll_create1(0);
  struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[MAX_EVENTS];
  epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &event);
  for (;;) {
    int count = epoll_wait(epoll_fd, events, MAX_EVENTS, send_due());
    for (int i = 0; i < count; i++) {
      int fd = events[i].data.fd;
      if (fd == listener) accept_all(listener);
      else if (connections[fd] != NULL && connections[fd]->used) read_requests(fd, connections[fd]);
    }
  }
}
