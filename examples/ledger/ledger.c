/*
 * Ledger: every node has an account of 1,000,000 and sends random amounts to
 * random peers, all the time, half of them in UDP datagrams and half over TCP.
 * Each transfer has a number, one more than the sender's last to that peer by
 * that transport, and both ends write it down. So whatever has happened to nodes
 * and network, the logs tell whether a transfer was lost, came twice, or came
 * without having been sent.
 *
 *   ledger run [-r TRANSFERS_A_SECOND]   with the nodes in /run/violin/hostfile
 *   ledger freeze                        no new transfers; what is under way arrives
 *   ledger thaw
 *   ledger report                        for people
 *   ledger dump                          the log's pages, to standard output
 *
 * A datagram is sent once: what the network loses is lost. A transfer is in its
 * sender's log before it is sent, and in its receiver's once it is received.
 *
 * The log, /run/ledger, is a file in memory of pages that each tell what they
 * are, so that it can also be read out of the memory of a node that does not run.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	PORT = 7001,
	INITIAL = 1000000,
	MOST = 1000,      /* in one transfer */
	NODES = 8,        /* at most */
	TICK = 10,        /* milliseconds between two looks at the clock */
	ENTRIES = 2016,   /* of a page */
	LOG_PAGES = 128,  /* of one log: 258,048 transfers */
};
enum { HEAD, SENT, RECEIVED };
enum { UDP, TCP, TRANSPORTS };

static const char *path = "/run/ledger", *hostfile = "/run/violin/hostfile";
static const char magic[16] = "violin ledger 1\n";

/* A page of the log, little-endian. The generation grows with every change: of
 * two copies in a node's memory, the one with the greater counts. */
struct page {
	char magic[16];
	uint64_t generation;
	uint32_t node, index; /* whose, and which page of the file */
	uint8_t kind, transport, peer, unused;
	uint32_t first; /* number of the transfer in the first entry, from 1 */
	char name[24];  /* of the node */
	union {
		uint16_t entry[ENTRIES]; /* amounts; 0: not sent, not received */
		struct {
			int64_t balance;
			uint32_t nodes, frozen;
			uint64_t duplicates, disorder, corrupt, broken;
			uint32_t sent[TRANSPORTS][NODES], received[TRANSPORTS][NODES];
		} head;
	};
};
_Static_assert(sizeof(struct page) == 4096, "a page is a page of memory");

/* What travels, in network order. */
struct record {
	uint32_t magic; /* "VLGR" */
	uint8_t from, to, transport, unused;
	uint32_t seq, amount, sum;
};
_Static_assert(sizeof(struct record) == 20, "no padding");

struct stream {
	int fd; /* -1: none */
	int have;
	char buf[sizeof(struct record)];
};

static struct page *log_pages; /* page 0 is the head */
static struct page *head;
static int self, nodes, rate = 100, udp = -1, listener = -1;
static char name[NODES][24];
static struct sockaddr_in address[NODES];
static struct stream out[NODES]; /* to a peer; have is what waits to be written */
static int connecting[NODES];
static struct stream in[NODES]; /* from whoever connected */
static struct record waiting;   /* a datagram that the kernel had no room for */
static int waiting_for = -1;
static uint64_t randomness;

static void die(const char *what) {
	fprintf(stderr, "ledger: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The clock is in it, so that a node that goes on twice from one state does not do
 * the same twice. */
static uint32_t chance(uint32_t below) {
	randomness = (randomness ^ now()) * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(randomness >> 33) % below;
}

static size_t file_size(void) {
	return sizeof(struct page) * (1 + 2 * TRANSPORTS * NODES * (size_t)LOG_PAGES);
}

static void open_log(int flags) {
	int fd = open(path, flags, 0600);
	if (fd < 0 || ((flags & O_CREAT) && ftruncate(fd, file_size())))
		die(path);
	log_pages = mmap(NULL, file_size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (log_pages == MAP_FAILED)
		die(path);
	close(fd);
	head = log_pages;
}

static struct page *touch(int index, int kind, int transport, int peer, uint32_t first) {
	struct page *p = &log_pages[index];
	if (!p->generation) {
		memcpy(p->magic, magic, sizeof magic);
		p->node = self, p->index = index;
		p->kind = kind, p->transport = transport, p->peer = peer, p->first = first;
		memcpy(p->name, name[self], sizeof p->name);
	}
	p->generation++;
	return p;
}

/* The entry of a transfer, about to be changed if for_change; NULL beyond the log. */
static uint16_t *entry(int kind, int transport, int peer, uint32_t seq, int for_change) {
	static uint16_t none;
	uint32_t i = seq - 1;
	if (seq == 0 || i >= LOG_PAGES * ENTRIES)
		return NULL;
	int n = ((kind == RECEIVED) * TRANSPORTS + transport) * NODES + peer;
	int index = 1 + n * LOG_PAGES + i / ENTRIES;
	if (for_change)
		touch(index, kind, transport, peer, i / ENTRIES * ENTRIES + 1);
	else if (!log_pages[index].generation)
		return &none;
	return &log_pages[index].entry[i % ENTRIES];
}

static uint32_t checksum(const struct record *r) {
	uint32_t h = 2166136261u;
	for (size_t i = 0; i < offsetof(struct record, sum); i++)
		h = (h ^ ((const uint8_t *)r)[i]) * 16777619u;
	return htonl(h);
}

/* The transfer is taken from the account and written down; it has yet to be sent. */
static int book(struct record *r, int transport, int peer, int amount) {
	uint32_t seq = head->head.sent[transport][peer] + 1;
	uint16_t *e = entry(SENT, transport, peer, seq, 1);
	if (!e || head->head.balance < amount)
		return 0;
	*e = amount;
	touch(0, HEAD, 0, 0, 0);
	head->head.sent[transport][peer] = seq;
	head->head.balance -= amount;
	*r = (struct record){.magic = htonl(0x564c4752), .from = self, .to = peer, .transport = transport, .seq = htonl(seq), .amount = htonl(amount)};
	r->sum = checksum(r);
	return 1;
}

/* The transfer is written down and paid in; returns its sender, or -1. */
static int credit(const struct record *r, size_t size, int transport) {
	uint32_t seq = ntohl(r->seq), amount = ntohl(r->amount);
	touch(0, HEAD, 0, 0, 0);
	if (size != sizeof *r || r->magic != htonl(0x564c4752) || r->sum != checksum(r) || r->to != self || r->from >= nodes ||
	    r->from == self || r->transport != transport || amount < 1 || amount > MOST || !entry(RECEIVED, transport, r->from, seq, 0)) {
		head->head.corrupt++;
		return -1;
	}
	if (*entry(RECEIVED, transport, r->from, seq, 0)) {
		head->head.duplicates++;
		return r->from;
	}
	if (transport == TCP && seq != head->head.received[TCP][r->from] + 1)
		head->head.disorder++;
	*entry(RECEIVED, transport, r->from, seq, 1) = amount;
	head->head.received[transport][r->from]++;
	head->head.balance += amount;
	return r->from;
}

static void broken(struct stream *s) {
	touch(0, HEAD, 0, 0, 0);
	head->head.broken++;
	close(s->fd);
	s->fd = -1;
}

static int full(void) { return errno == EAGAIN || errno == ENOBUFS || errno == EINTR; }

static void flush(int peer) {
	struct stream *s = &out[peer];
	while (s->fd >= 0 && s->have > 0) {
		ssize_t n = send(s->fd, s->buf + sizeof s->buf - s->have, s->have, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0) {
			if (!full())
				broken(s);
			return;
		}
		s->have -= n;
	}
}

static void send_datagram(void) {
	ssize_t n = sendto(udp, &waiting, sizeof waiting, MSG_DONTWAIT, (struct sockaddr *)&address[waiting_for], sizeof address[0]);
	if (n < 0 && full())
		return;
	if (n < 0)
		perror("ledger: send a datagram");
	waiting_for = -1;
}

static void transfer(void) {
	int peer = chance(nodes - 1), transport = chance(TRANSPORTS), amount = 1 + chance(MOST);
	peer += peer >= self;
	struct stream *s = &out[peer];
	if (s->fd < 0 || connecting[peer])
		return; /* nobody listens there yet */
	if (transport == UDP && waiting_for < 0 && book(&waiting, UDP, peer, amount)) {
		waiting_for = peer;
		send_datagram();
	}
	struct record r;
	if (transport == TCP && s->have == 0 && book(&r, TCP, peer, amount)) {
		memcpy(s->buf, &r, sizeof r);
		s->have = sizeof r;
		flush(peer);
	}
}

static void take_datagrams(void) {
	char buf[2 * sizeof(struct record)];
	ssize_t n;
	while ((n = recv(udp, buf, sizeof buf, MSG_DONTWAIT)) >= 0)
		credit((struct record *)buf, n, UDP);
}

static void take_stream(struct stream *s) {
	for (;;) {
		ssize_t n = recv(s->fd, s->buf + s->have, sizeof s->buf - s->have, MSG_DONTWAIT);
		if (n <= 0) {
			if (n == 0 || !full())
				broken(s);
			return;
		}
		if ((s->have += n) == sizeof s->buf) {
			s->have = 0;
			credit((struct record *)s->buf, sizeof s->buf, TCP);
		}
	}
}

static void take_connection(void) {
	int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
	for (int i = 0; fd >= 0 && i < nodes; i++)
		if (in[i].fd < 0) {
			in[i] = (struct stream){.fd = fd};
			return;
		}
	if (fd >= 0)
		close(fd);
}

static void connect_to(int peer) {
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
	if (fd < 0)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (connect(fd, (struct sockaddr *)&address[peer], sizeof address[0]) && errno != EINPROGRESS) {
		close(fd);
		return;
	}
	out[peer] = (struct stream){.fd = fd};
	connecting[peer] = 1;
}

static void connected(int peer) {
	int err = 0;
	socklen_t len = sizeof err;
	getsockopt(out[peer].fd, SOL_SOCKET, SO_ERROR, &err, &len);
	connecting[peer] = 0;
	if (err) {
		close(out[peer].fd);
		out[peer].fd = -1; /* not up yet: once more, with the next tick of a second */
	} else {
		printf("ledger: connected to %s\n", name[peer]);
		fflush(stdout);
	}
}

/* Nodes are numbered in the order of their names, the same everywhere. */
static void read_hosts(void) {
	char me[24] = "", line[256];
	gethostname(me, sizeof me - 1);
	FILE *f = fopen(hostfile, "r");
	if (!f)
		die(hostfile);
	while (nodes < NODES && fgets(line, sizeof line, f))
		if (sscanf(line, "%23[^ \n]", name[nodes]) == 1)
			nodes++;
	fclose(f);
	qsort(name, nodes, sizeof name[0], (int (*)(const void *, const void *))strcmp);
	self = -1;
	for (int i = 0; i < nodes; i++) {
		if (!strcmp(name[i], me))
			self = i;
		struct addrinfo hints = {.ai_family = AF_INET}, *a;
		if (getaddrinfo(name[i], NULL, &hints, &a)) {
			fprintf(stderr, "ledger: no address of %s\n", name[i]);
			exit(1);
		}
		address[i] = *(struct sockaddr_in *)a->ai_addr;
		address[i].sin_port = htons(PORT);
		freeaddrinfo(a);
	}
	if (self < 0 || nodes < 2) {
		fprintf(stderr, "ledger: %s: %s and at least one other node have to be in it\n", hostfile, me);
		exit(1);
	}
}

static void run(void) {
	read_hosts();
	open_log(O_RDWR | O_CREAT | O_EXCL);
	touch(0, HEAD, 0, 0, 0);
	head->head.nodes = nodes;
	head->head.balance = INITIAL;
	if (getrandom(&randomness, sizeof randomness, 0) < 0)
		die("getrandom");

	/* Who is connected to has its socket for datagrams, too. */
	struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int on = 1;
	udp = socket(AF_INET, SOCK_DGRAM, 0);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (udp < 0 || bind(udp, (struct sockaddr *)&any, sizeof any) || listener < 0 ||
	    bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, NODES))
		die("listen");
	for (int i = 0; i < NODES; i++)
		in[i].fd = out[i].fd = -1;

	static int tried[NODES];
	uint64_t last = now();
	double due = 0;
	for (;;) {
		struct pollfd fds[2 + 2 * NODES] = {{udp, POLLIN | (waiting_for >= 0 ? POLLOUT : 0), 0}, {listener, POLLIN, 0}};
		for (int i = 0; i < nodes; i++) {
			fds[2 + i] = (struct pollfd){out[i].fd, connecting[i] || out[i].have > 0 ? POLLOUT : 0, 0};
			fds[2 + nodes + i] = (struct pollfd){in[i].fd, POLLIN, 0};
		}
		poll(fds, 2 + 2 * nodes, TICK);
		take_datagrams();
		if (waiting_for >= 0)
			send_datagram();
		if (fds[1].revents)
			take_connection();
		for (int i = 0; i < nodes; i++) {
			if (fds[2 + i].revents && connecting[i])
				connected(i);
			else if (fds[2 + i].revents & (POLLERR | POLLHUP))
				broken(&out[i]);
			else if (fds[2 + i].revents)
				flush(i);
			if (fds[2 + nodes + i].revents)
				take_stream(&in[i]);
		}
		uint64_t t = now();
		for (int i = 0; i < nodes && !head->head.broken; i++)
			if (i != self && out[i].fd < 0 && t / 1000000000 != (uint64_t)tried[i]) {
				tried[i] = t / 1000000000;
				connect_to(i);
			}
		due += (t - last) * 1e-9 * rate;
		last = t;
		if (due > rate / 10.0 + 1) /* it was paused: no burst */
			due = rate / 10.0 + 1;
		if (*(volatile uint32_t *)&head->head.frozen)
			due = 0;
		for (; due >= 1; due--)
			transfer();
	}
}

static void report(void) {
	printf("%s: account %lld%s; %llu duplicates, %llu out of order, %llu corrupt, %llu connections broken\n", head->name,
	       (long long)head->head.balance, head->head.frozen ? ", frozen" : "", (unsigned long long)head->head.duplicates,
	       (unsigned long long)head->head.disorder, (unsigned long long)head->head.corrupt, (unsigned long long)head->head.broken);
	for (uint32_t p = 0; p < head->head.nodes; p++)
		if (p != head->node)
			printf("peer %u: udp %u sent %u received, tcp %u sent %u received\n", p, head->head.sent[UDP][p],
			       head->head.received[UDP][p], head->head.sent[TCP][p], head->head.received[TCP][p]);
}

/* Pages of a log come into being one after the other. To look at one that has not
 * would make it. */
static void dump(void) {
	for (int n = -1; n < 2 * TRANSPORTS * NODES; n++)
		for (int i = 0; i < (n < 0 ? 1 : LOG_PAGES); i++) {
			const struct page *p = &log_pages[n < 0 ? 0 : 1 + n * LOG_PAGES + i];
			if (!p->generation)
				break;
			if (fwrite(p, sizeof *p, 1, stdout) != 1)
				die("standard output");
		}
	if (fflush(stdout))
		die("standard output");
}

int main(int argc, char **argv) {
	const char *verb = argc > 1 ? argv[1] : "";
	if (!strcmp(verb, "run") && (argc == 2 || (argc == 4 && !strcmp(argv[2], "-r")))) {
		if (argc == 4)
			rate = atoi(argv[3]);
		run();
	}
	int freeze = !strcmp(verb, "freeze"), thaw = !strcmp(verb, "thaw");
	if (!freeze && !thaw && strcmp(verb, "report") && strcmp(verb, "dump")) {
		fprintf(stderr, "usage: ledger run [-r TRANSFERS_A_SECOND] | freeze | thaw | report | dump\n");
		return 2;
	}
	open_log(O_RDWR);
	if (freeze || thaw)
		*(volatile uint32_t *)&head->head.frozen = freeze;
	else if (!strcmp(verb, "report"))
		report();
	else
		dump();
	return 0;
}
