/*
 * The client of Scoria's shared-memory rings. The protocol is documented in
 * shm/wire/doc.go (messages) and shm/ring/doc.go (memory).
 *
 * Locks: a disk's mutex guards its socket. A ring has none: it is its thread's.
 * A ring whose epoch is not its disk's belongs to a connection that is gone.
 *
 * Waiting: a thread that waits looks at the ring for its window, and then sleeps
 * until the server calls. The window doubles when polling finds a completion and
 * shrinks to nothing when it does not, as is the case when the server shares the
 * CPU or the device is slow; then, seldom, one whole window probes whether that
 * changed. So what polling in vain costs is bounded, and who waits long sleeps.
 */
#define _GNU_SOURCE
#include "scoria_shm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the protocol is little-endian, and so must the machine be"
#endif

#define MAX_MESSAGE 8192
#define MAX_FDS 3
#define ANSWER 0x80000000u
#define MAX_NAME 255
#define HEADER_BYTES 4096
#define BOUNCE_BYTES (256u << 10) /* of the library's own part of the arena */
#define LIST_BYTES (SCORIA_MAX_PIECES * sizeof(struct segment))
#define ANSWER_SECONDS 90 /* the server gives up first */
#define CHECK_POLLS 4096  /* looks in vain before the socket is looked at */
#define LOOKS_PER_CLOCK 16 /* looks at the ring before the clock is asked */
#define PROBE_MIN 16	  /* waits without polling before one probes whether it pays */
#define PROBE_MAX 2048	  /* the same after probes in vain */

enum { HELLO = 1, OPEN, RING, CLOSE_RING, STAT, CREATE, RESIZE, LIST, SNAPSHOT, CHANGED = 100 };

struct header {
	uint32_t bytes, type, tag, status;
};

struct entry { /* of the submission ring */
	uint64_t cookie, offset, length, addr;
	uint8_t op, flags;
	uint16_t segments;
	uint32_t zero1;
	uint64_t zero2[2];
	uint32_t zero3;
	_Atomic uint32_t sequence;
};

struct done { /* of the completion ring */
	uint64_t cookie;
	uint32_t status;
	_Atomic uint32_t sequence;
};

struct segment {
	uint64_t addr;
	uint32_t length, zero;
};

struct volume {
	uint64_t size, max_discard;
	uint32_t logical_block, physical_block, discard_alignment, flags;
	char serial[24];
};

_Static_assert(sizeof(struct entry) == 64, "an entry is a cache line");
_Static_assert(sizeof(struct done) == 16 && sizeof(struct segment) == 16 && sizeof(struct volume) == 56, "as documented");

struct scoria_disk {
	pthread_mutex_t lock;
	int fd; /* the number stays; the connection behind it may change */
	uint32_t tag;
	_Atomic uint64_t epoch; /* of the connection; changed under lock */
	int reconnect;  /* ms */
	unsigned flags;
	char *path, *volume;
	struct scoria_info info;
};

struct slot {
	void *cookie;
	struct entry entry; /* enough to submit it again */
	uint64_t order;
	bool used;
};

struct scoria_ring {
	struct scoria_disk *disk;
	uint64_t epoch;
	uint32_t number;
	int memfd, kick, call;
	int alarm; /* epoll: the server calls, or its end of the connection is closed */
	int peer;  /* the connection of this epoch, whatever other rings make of the disk's */
	uint8_t *memory;
	size_t bytes;
	unsigned entries;
	struct entry *submit;
	struct done *complete;
	_Atomic uint32_t *kick_flag, *call_flag;
	uint8_t *arena;
	size_t user, arena_bytes; /* the caller's part, and the whole */
	uint32_t added, shown, polled;
	unsigned under_way, vain;
	uint64_t order;
	uint64_t poll_ns, window_ns; /* the longest window, and the present one */
	unsigned unpolled, probe_every; /* waits since the last probe, and how many there are to be */
	struct scoria_ring_stats stats;
	struct slot *slots;
	uint16_t *free; /* stack of slots, entries - under_way of them */
};

static _Thread_local char error_text[512] = "no error";

const char *scoria_error(void) { return error_text; }

__attribute__((format(printf, 2, 3))) static int fail(int err, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	vsnprintf(error_text, sizeof error_text, format, args);
	va_end(args);
	return err;
}

static int fail_errno(const char *what)
{
	int err = errno;
	return fail(-err, "%s: %s", what, strerror(err));
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- messages ---- */

static int connect_to(const char *path)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = ANSWER_SECONDS};
	int fd;
	if (strlen(path) >= sizeof addr.sun_path)
		return fail(-ENAMETOOLONG, "%s: too long for a socket's path", path);
	strcpy(addr.sun_path, path);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fail_errno("socket");
	if (connect(fd, (struct sockaddr *)&addr, sizeof addr) < 0) {
		int err = fail_errno(path);
		close(fd);
		return err == -ENOENT ? -ECONNREFUSED : err; /* ENOENT is for volumes */
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	return fd;
}

static int send_message(int fd, struct header h, const void *head, size_t head_bytes, const void *tail, size_t tail_bytes, int pass)
{
	struct iovec iov[3] = {{&h, sizeof h}, {(void *)(uintptr_t)head, head_bytes}, {(void *)(uintptr_t)tail, tail_bytes}};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr m = {.msg_iov = iov, .msg_iovlen = 3};
	h.bytes = (uint32_t)(sizeof h + head_bytes + tail_bytes);
	if (pass >= 0) {
		struct cmsghdr *c;
		memset(&control, 0, sizeof control);
		m.msg_control = &control;
		m.msg_controllen = sizeof control;
		c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &pass, sizeof(int));
	}
	for (;;) {
		if (sendmsg(fd, &m, MSG_NOSIGNAL) >= 0)
			return 0;
		if (errno != EINTR)
			return fail_errno("sending to the server");
	}
}

/* Reads a message; returns the body's length. fds has room for MAX_FDS. */
static ssize_t read_message(int fd, int flags, struct header *h, uint8_t *body, int *fds, int *nfds)
{
	struct iovec iov[2] = {{h, sizeof *h}, {body, MAX_MESSAGE - sizeof *h}};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} control;
	struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t n;
	*nfds = 0;
	do
		n = recvmsg(fd, &m, MSG_CMSG_CLOEXEC | flags);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return fail_errno("reading from the server");
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
			*nfds = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
			memcpy(fds, CMSG_DATA(c), (size_t)*nfds * sizeof(int));
		}
	}
	if (n == 0)
		return fail(-ECONNRESET, "the server closed the connection");
	if ((size_t)n < sizeof *h || h->bytes != (uint32_t)n || (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return fail(-EPROTO, "the server sent a broken message of %zd bytes", n);
	return n - (ssize_t)sizeof *h;
}

static void close_all(int *fds, int n)
{
	while (n > 0)
		close(fds[--n]);
}

static int code_errno(uint32_t code)
{
	static const int map[] = {0, -EINVAL, -ENOENT, -EEXIST, -EBUSY, -EACCES, -EOPNOTSUPP, -EAGAIN, -EIO, -ECONNRESET};
	return code < sizeof map / sizeof map[0] ? map[code] : -EIO;
}

static int status_errno(uint32_t status)
{
	static const int map[] = {0, -EIO, -EINVAL, -ENOSPC, -EINVAL, -EROFS, -EOPNOTSUPP, -EBADMSG, -EIO};
	return status < sizeof map / sizeof map[0] ? map[status] : -EIO;
}

static int note_volume(struct scoria_info *info, const uint8_t *body, ssize_t n)
{
	struct volume v;
	size_t name = (size_t)n - sizeof v;
	if (n < (ssize_t)sizeof v)
		return fail(-EPROTO, "the server described a volume in %zd bytes", n);
	memcpy(&v, body, sizeof v);
	if (name > MAX_NAME)
		name = MAX_NAME;
	info->size = v.size;
	info->max_discard = v.max_discard;
	info->logical_block = v.logical_block;
	info->physical_block = v.physical_block;
	info->discard_alignment = v.discard_alignment;
	info->read_only = v.flags & 1;
	memset(info->serial, 0, sizeof info->serial);
	memcpy(info->serial, v.serial, sizeof v.serial);
	memcpy(info->name, body + sizeof v, name);
	info->name[name] = 0;
	return 0;
}

/*
 * Sends a request and waits for its answer, whose length it returns; exactly
 * want descriptors come with it. info takes in changes told meanwhile.
 */
static ssize_t ask(int fd, uint32_t *tag, struct scoria_info *info, uint32_t type, const void *head, size_t head_bytes, const void *tail,
		   size_t tail_bytes, int pass, uint8_t *body, int *fds, int want)
{
	struct header h = {.type = type, .tag = ++*tag};
	int err = send_message(fd, h, head, head_bytes, tail, tail_bytes, pass);
	if (err)
		return err;
	for (;;) {
		int got[MAX_FDS], n;
		ssize_t len = read_message(fd, 0, &h, body, got, &n);
		if (len >= 0 && h.type == CHANGED) {
			close_all(got, n);
			if (info)
				note_volume(info, body, len);
			continue;
		}
		if (len >= 0 && (h.type != (type | ANSWER) || h.tag != *tag))
			len = fail(-EPROTO, "the server answered something else");
		if (len >= 0 && h.status)
			len = fail(code_errno(h.status), "%.*s", (int)len, (char *)body);
		if (len >= 0 && n != want)
			len = fail(-EPROTO, "the server sent %d descriptors, not %d", n, want);
		if (len < 0) {
			close_all(got, n);
			return len;
		}
		if (want)
			memcpy(fds, got, (size_t)want * sizeof(int));
		return len;
	}
}

static int hello(int fd, uint32_t *tag, uint64_t *max_request)
{
	struct {
		char magic[8];
		uint32_t low, high;
	} req = {{'S', 'C', 'O', 'R', 'S', 'H', 'M', 'S'}, SCORIA_SHM_VERSION, SCORIA_SHM_VERSION};
	uint8_t body[MAX_MESSAGE];
	uint32_t version;
	ssize_t n = ask(fd, tag, NULL, HELLO, &req, sizeof req, NULL, 0, -1, body, NULL, 0);
	if (n < 0)
		return (int)n;
	if (n < 40 || memcmp(body, req.magic, 8))
		return fail(-EPROTO, "this is no server of Scoria's");
	memcpy(&version, body + 8, 4);
	if (version != SCORIA_SHM_VERSION)
		return fail(-EPROTO, "the server speaks version %u", version);
	memcpy(max_request, body + 32, 8);
	return 0;
}

/* Connects, says hello and opens the volume; returns the socket. */
static int connect_volume(struct scoria_disk *d)
{
	uint64_t flags = d->flags & SCORIA_READ_ONLY;
	uint8_t body[MAX_MESSAGE];
	int fd = connect_to(d->path), err;
	ssize_t n;
	if (fd < 0)
		return fd;
	err = hello(fd, &d->tag, &d->info.max_request);
	if (!err) {
		n = ask(fd, &d->tag, NULL, OPEN, &flags, 8, d->volume, strlen(d->volume), -1, body, NULL, 0);
		err = n < 0 ? (int)n : note_volume(&d->info, body, n);
	}
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

/* ---- disks ---- */

static void free_disk(struct scoria_disk *d)
{
	if (d->fd >= 0)
		close(d->fd);
	pthread_mutex_destroy(&d->lock);
	free(d->path);
	free(d->volume);
	free(d);
}

int scoria_open(scoria_disk **disk, const char *socket, const char *volume, unsigned flags)
{
	struct scoria_disk *d;
	if (!volume || !*volume || strlen(volume) > MAX_NAME)
		return fail(-EINVAL, "volume: must be POOL/VOLUME of at most %d bytes", MAX_NAME);
	if (flags & ~(unsigned)SCORIA_READ_ONLY)
		return fail(-EINVAL, "flags %#x: not known", flags);
	d = calloc(1, sizeof *d);
	if (!d)
		return fail(-ENOMEM, "out of memory");
	pthread_mutex_init(&d->lock, NULL);
	d->reconnect = -1;
	d->flags = flags;
	d->path = strdup(socket ? socket : SCORIA_SHM_SOCKET);
	d->volume = strdup(volume);
	d->fd = d->path && d->volume ? connect_volume(d) : fail(-ENOMEM, "out of memory");
	if (d->fd < 0) {
		int err = d->fd;
		free_disk(d);
		return err;
	}
	*disk = d;
	return 0;
}

void scoria_close(scoria_disk *d)
{
	if (d)
		free_disk(d);
}

void scoria_set_reconnect(scoria_disk *d, int milliseconds)
{
	pthread_mutex_lock(&d->lock);
	d->reconnect = milliseconds;
	pthread_mutex_unlock(&d->lock);
}

/* Takes in what the server told on its own. The lock is held. */
static void read_notices(struct scoria_disk *d)
{
	struct header h;
	uint8_t body[MAX_MESSAGE];
	int fds[MAX_FDS], n;
	struct pollfd p = {.fd = d->fd, .events = POLLIN};
	while (poll(&p, 1, 0) == 1 && (p.revents & POLLIN)) {
		ssize_t len = read_message(d->fd, MSG_DONTWAIT, &h, body, fds, &n);
		close_all(fds, n);
		if (len < 0)
			return; /* the end is found by whoever waits */
		if (h.type == CHANGED)
			note_volume(&d->info, body, len);
	}
}

int scoria_get_info(scoria_disk *d, struct scoria_info *info, size_t size)
{
	pthread_mutex_lock(&d->lock);
	read_notices(d);
	memset(info, 0, size);
	memcpy(info, &d->info, size < sizeof d->info ? size : sizeof d->info);
	pthread_mutex_unlock(&d->lock);
	return 0;
}

static bool hung_up(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLRDHUP};
	return poll(&p, 1, 0) == 1 && (p.revents & (POLLHUP | POLLRDHUP | POLLERR));
}

/* Makes a new connection in place of that of an epoch. The lock is held. */
static int reconnect(struct scoria_disk *d, uint64_t epoch)
{
	uint64_t end = now_ns() + (uint64_t)(d->reconnect < 0 ? 0 : d->reconnect) * 1000000u;
	long pause = 1000000;
	if (d->epoch != epoch)
		return 0; /* another ring's thread did it */
	for (;;) {
		int fd = connect_volume(d);
		if (fd >= 0) {
			dup3(fd, d->fd, O_CLOEXEC);
			close(fd);
			d->epoch++;
			d->info.reconnects++;
			return 0;
		}
		if (fd == -ENOENT || fd == -EACCES || fd == -EPROTO || fd == -EINVAL)
			return fd; /* the server is back, but this will not pass */
		if (d->reconnect >= 0 && now_ns() >= end)
			return fail(-ECONNRESET, "the server is gone and did not come back in time");
		nanosleep(&(struct timespec){.tv_nsec = pause}, NULL);
		pause = pause < 50000000 ? 2 * pause : 100000000;
	}
}

/* ---- rings ---- */

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/*
 * Makes what the ring's thread sleeps on. Calls are edge-triggered, so that nobody
 * has to read the count. The connection has a descriptor of the ring's own: another
 * ring's thread may reconnect the disk before this one sees that it hung up.
 */
static int set_alarm(struct scoria_ring *r)
{
	struct epoll_event call = {.events = EPOLLIN | EPOLLET}, peer = {.events = EPOLLRDHUP, .data.u32 = 1};
	close_fd(&r->alarm);
	close_fd(&r->peer);
	r->peer = fcntl(r->disk->fd, F_DUPFD_CLOEXEC, 0);
	r->alarm = epoll_create1(EPOLL_CLOEXEC);
	if (r->peer < 0 || r->alarm < 0 || epoll_ctl(r->alarm, EPOLL_CTL_ADD, r->call, &call) < 0 ||
	    epoll_ctl(r->alarm, EPOLL_CTL_ADD, r->peer, &peer) < 0)
		return fail_errno("watching the ring's eventfd");
	return 0;
}

/* Asks for the ring: a new one, or one in the memory there is. The lock is held. */
static int attach(struct scoria_ring *r)
{
	struct {
		uint32_t entries, flags;
		uint64_t arena;
	} req = {r->entries, r->memory != NULL, r->arena_bytes};
	struct scoria_disk *d = r->disk;
	uint8_t body[MAX_MESSAGE];
	int fds[MAX_FDS], *pair = fds;
	uint64_t bytes;
	ssize_t n;
	if (r->memory) { /* the former server is done with it: it closes the connection last */
		memset(r->submit, 0, r->entries * sizeof *r->submit);
		memset(r->complete, 0, r->entries * sizeof *r->complete);
		atomic_store(r->kick_flag, 0);
		atomic_store(r->call_flag, 0);
	}
	n = ask(d->fd, &d->tag, &d->info, RING, &req, sizeof req, NULL, 0, r->memory ? r->memfd : -1, body, fds, r->memory ? 2 : 3);
	if (n < 0)
		return (int)n;
	if (n < 16) {
		close_all(fds, r->memory ? 2 : 3);
		return fail(-EPROTO, "the server described a ring in %zd bytes", n);
	}
	if (!r->memory) {
		memcpy(&r->number, body, 4);
		memcpy(&bytes, body + 8, 8);
		r->memfd = fds[0];
		r->bytes = bytes;
		pair = fds + 1;
	}
	memcpy(&r->number, body, 4);
	close_fd(&r->kick);
	close_fd(&r->call);
	r->kick = pair[0];
	r->call = pair[1];
	r->epoch = d->epoch;
	r->added = r->shown = r->polled = 0;
	return set_alarm(r);
}

static int map_memory(struct scoria_ring *r)
{
	uint64_t offsets[4]; /* submission, completion, arena; length of the arena */
	size_t need;
	r->memory = mmap(NULL, r->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, r->memfd, 0);
	if (r->memory == MAP_FAILED) {
		r->memory = NULL;
		return fail_errno("mapping the ring");
	}
	memcpy(offsets, r->memory + 16, sizeof offsets);
	need = r->arena_bytes + HEADER_BYTES + r->entries * (sizeof *r->submit + sizeof *r->complete);
	if (memcmp(r->memory, "SCORSHMR", 8) || r->bytes < need || offsets[0] != HEADER_BYTES || offsets[3] != r->arena_bytes ||
	    offsets[1] != HEADER_BYTES + r->entries * sizeof *r->submit || offsets[2] > r->bytes - r->arena_bytes)
		return fail(-EPROTO, "the server made a ring that is not as agreed");
	r->submit = (struct entry *)(void *)(r->memory + offsets[0]);
	r->complete = (struct done *)(void *)(r->memory + offsets[1]);
	r->arena = r->memory + offsets[2];
	r->kick_flag = (_Atomic uint32_t *)(void *)(r->memory + 128);
	r->call_flag = (_Atomic uint32_t *)(void *)(r->memory + 192);
	return 0;
}

int scoria_ring_create(scoria_disk *d, unsigned entries, size_t arena, scoria_ring **ring)
{
	struct scoria_ring *r;
	int err;
	if (entries == 0 || entries > 1024 || (entries & (entries - 1)))
		return fail(-EINVAL, "ring of %u entries: must be a power of two up to 1024", entries);
	r = calloc(1, sizeof *r);
	if (!r)
		return fail(-ENOMEM, "out of memory");
	r->disk = d;
	r->memfd = r->kick = r->call = r->alarm = r->peer = -1;
	r->entries = entries;
	scoria_ring_set_poll(r, 50);
	r->user = (arena + 4095) & ~(size_t)4095;
	r->arena_bytes = (r->user + BOUNCE_BYTES + entries * LIST_BYTES + 4095) & ~(size_t)4095;
	r->slots = calloc(entries, sizeof *r->slots);
	r->free = calloc(entries, sizeof *r->free);
	err = r->slots && r->free ? 0 : fail(-ENOMEM, "out of memory");
	for (unsigned i = 0; !err && i < entries; i++)
		r->free[i] = (uint16_t)i;
	if (!err) {
		pthread_mutex_lock(&d->lock);
		while ((err = attach(r)) && (err == -ECONNRESET || err == -EPIPE || err == -ECONNREFUSED) && !(err = reconnect(d, d->epoch)))
			;
		pthread_mutex_unlock(&d->lock);
	}
	if (!err)
		err = map_memory(r);
	if (err) {
		scoria_ring_destroy(r);
		return err;
	}
	*ring = r;
	return 0;
}

void scoria_ring_destroy(scoria_ring *r)
{
	if (!r)
		return;
	if (r->memory) {
		uint64_t number = r->number;
		uint8_t body[MAX_MESSAGE];
		struct scoria_disk *d = r->disk;
		pthread_mutex_lock(&d->lock);
		if (r->epoch == d->epoch) /* whatever comes of it: the end of the connection ends the ring, too */
			ask(d->fd, &d->tag, &d->info, CLOSE_RING, &number, 8, NULL, 0, -1, body, NULL, 0);
		pthread_mutex_unlock(&d->lock);
		munmap(r->memory, r->bytes);
	}
	for (int **fd = (int *[]){&r->memfd, &r->kick, &r->call, &r->alarm, &r->peer, NULL}; *fd; fd++)
		close_fd(*fd);
	free(r->slots);
	free(r->free);
	free(r);
}

void *scoria_ring_arena(scoria_ring *r, size_t *bytes)
{
	if (bytes)
		*bytes = r->user;
	return r->arena;
}

void scoria_ring_set_poll(scoria_ring *r, unsigned microseconds)
{
	r->poll_ns = r->window_ns = microseconds * (uint64_t)1000;
	r->unpolled = 0;
	r->probe_every = PROBE_MIN;
}

void scoria_ring_get_stats(scoria_ring *r, struct scoria_ring_stats *stats, size_t size)
{
	memset(stats, 0, size);
	memcpy(stats, &r->stats, size < sizeof r->stats ? size : sizeof r->stats);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;
	while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
		;
}

/* Writes an entry that the server sees after the next publish. */
static void add(struct scoria_ring *r, const struct entry *e)
{
	struct entry *at = &r->submit[r->added & (r->entries - 1)];
	memcpy(at, e, offsetof(struct entry, sequence));
	r->added++;
	if (r->added - 1 != r->shown)
		atomic_store_explicit(&at->sequence, r->added, memory_order_relaxed);
}

static void publish(struct scoria_ring *r)
{
	if (r->added == r->shown)
		return;
	/* The first entry's sequence comes last: the others become visible with it. */
	atomic_store_explicit(&r->submit[r->shown & (r->entries - 1)].sequence, r->shown + 1, memory_order_release);
	r->shown = r->added;
	atomic_thread_fence(memory_order_seq_cst);
	if (atomic_load_explicit(r->kick_flag, memory_order_relaxed) && atomic_exchange(r->kick_flag, 0))
		signal_fd(r->kick);
}

static int by_order(const void *a, const void *b)
{
	const struct slot *x = *(struct slot *const *)a, *y = *(struct slot *const *)b;
	return x->order < y->order ? -1 : x->order > y->order;
}

/* Moves the ring to the present connection, or to a new one, and submits again. */
static int recover(struct scoria_ring *r)
{
	struct slot **kept = malloc(r->entries * sizeof *kept);
	struct scoria_disk *d = r->disk;
	unsigned n = 0;
	int err = 0;
	if (!kept)
		return fail(-ENOMEM, "out of memory");
	pthread_mutex_lock(&d->lock);
	do {
		if (r->epoch == d->epoch || hung_up(d->fd))
			err = reconnect(d, d->epoch);
		if (!err)
			err = attach(r);
		if (err == -EAGAIN) /* what others had may be about to be given back */
			nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
	} while (err == -ECONNRESET || err == -EPIPE || err == -EAGAIN);
	pthread_mutex_unlock(&d->lock);
	if (!err) {
		for (unsigned i = 0; i < r->entries; i++)
			if (r->slots[i].used)
				kept[n++] = &r->slots[i];
		qsort(kept, n, sizeof *kept, by_order);
		for (unsigned i = 0; i < n; i++)
			add(r, &kept[i]->entry);
		publish(r);
	}
	free(kept);
	return err;
}

/* Takes a slot for an entry, and adds it. */
static void enter(struct scoria_ring *r, struct entry *e, uint16_t slot, void *cookie)
{
	struct slot *s = &r->slots[slot];
	e->cookie = slot;
	r->under_way++;
	*s = (struct slot){.cookie = cookie, .entry = *e, .order = ++r->order, .used = true};
	add(r, e);
}

static int offset_of(struct scoria_ring *r, const void *data, uint64_t length, uint64_t *addr)
{
	uintptr_t off = (uintptr_t)data - (uintptr_t)r->arena;
	if (off > r->arena_bytes || length > r->arena_bytes - off)
		return fail(-EINVAL, "data is not in the ring's arena");
	*addr = off;
	return 0;
}

int scoria_submit(scoria_ring *r, enum scoria_op op, unsigned flags, uint64_t offset, uint64_t length, void *data, void *cookie)
{
	struct entry e = {.offset = offset, .length = length, .op = (uint8_t)op, .flags = (uint8_t)flags};
	if (r->under_way == r->entries)
		return fail(-EAGAIN, "the ring is full");
	if ((op == SCORIA_READ || op == SCORIA_WRITE) && offset_of(r, data, length, &e.addr))
		return -EINVAL;
	enter(r, &e, r->free[r->entries - 1 - r->under_way], cookie);
	return 0;
}

int scoria_submitv(scoria_ring *r, enum scoria_op op, unsigned flags, uint64_t offset, const struct iovec *pieces, unsigned count, void *cookie)
{
	struct entry e = {.offset = offset, .op = (uint8_t)op, .flags = (uint8_t)flags, .segments = (uint16_t)count};
	struct segment *list;
	uint16_t slot;
	if (count == 0 || count > SCORIA_MAX_PIECES)
		return fail(-EINVAL, "%u pieces: must be 1 to %d", count, SCORIA_MAX_PIECES);
	if (r->under_way == r->entries)
		return fail(-EAGAIN, "the ring is full");
	slot = r->free[r->entries - 1 - r->under_way];
	e.addr = r->user + BOUNCE_BYTES + slot * LIST_BYTES;
	list = (struct segment *)(void *)(r->arena + e.addr);
	for (unsigned i = 0; i < count; i++) {
		if (offset_of(r, pieces[i].iov_base, pieces[i].iov_len, &list[i].addr))
			return -EINVAL;
		list[i].length = (uint32_t)pieces[i].iov_len;
		list[i].zero = 0;
		e.length += pieces[i].iov_len;
	}
	enter(r, &e, slot, cookie);
	return 0;
}

int scoria_kick(scoria_ring *r)
{
	publish(r);
	return 0;
}

/* Takes completions that are there, at most max. */
static unsigned reap(struct scoria_ring *r, struct scoria_completion *out, unsigned max)
{
	unsigned n = 0;
	while (n < max) {
		struct done *c = &r->complete[r->polled & (r->entries - 1)];
		struct slot *s;
		if (atomic_load_explicit(&c->sequence, memory_order_acquire) != r->polled + 1)
			break;
		r->polled++;
		if (c->cookie >= r->entries || !r->slots[c->cookie].used)
			continue; /* not ours: a server that is out of order harms nobody but itself */
		s = &r->slots[c->cookie];
		s->used = false;
		out[n++] = (struct scoria_completion){s->cookie, status_errno(c->status)};
		r->under_way--;
		r->free[r->entries - 1 - r->under_way] = (uint16_t)c->cookie;
	}
	return n;
}

static bool completed(const struct scoria_ring *r)
{
	return atomic_load(&r->complete[r->polled & (r->entries - 1)].sequence) == r->polled + 1;
}

/* Sleeps until the server calls, hangs up (-ECONNRESET), or time, in ms, is up (-ETIMEDOUT; negative: never). */
static int sleep_for_call(struct scoria_ring *r, int timeout)
{
	struct epoll_event events[2];
	int err = 0;
	atomic_store(r->call_flag, 1);
	if (!completed(r)) {
		int n = epoll_wait(r->alarm, events, 2, timeout);
		r->stats.sleeps++;
		if (n < 0 && errno != EINTR)
			return fail_errno("epoll_wait");
		if (n == 0 && !completed(r))
			err = -ETIMEDOUT;
		for (int i = 0; i < n; i++)
			if (events[i].data.u32 == 1 && !completed(r))
				err = -ECONNRESET;
	}
	atomic_store_explicit(r->call_flag, 0, memory_order_relaxed);
	return err;
}

static void poll_hit(struct scoria_ring *r)
{
	uint64_t wider = 2 * r->window_ns > r->poll_ns / 8 ? 2 * r->window_ns : r->poll_ns / 8;
	r->window_ns = wider < r->poll_ns ? wider : r->poll_ns;
	r->probe_every = PROBE_MIN;
	r->stats.poll_hits++;
}

static void poll_missed(struct scoria_ring *r, bool probe)
{
	if (probe)
		r->probe_every = 2 * r->probe_every < PROBE_MAX ? 2 * r->probe_every : PROBE_MAX;
	else
		r->window_ns = r->window_ns / 4 < r->poll_ns / 32 ? 0 : r->window_ns / 4;
	r->stats.poll_misses++;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#endif
}

/*
 * Waits for a completion, by polling and then once by sleeping, after which there
 * need not be one. -ETIMEDOUT after deadline, ns on the clock (0: none);
 * -ECONNRESET if the ring has to move to another connection.
 */
static int await(struct scoria_ring *r, uint64_t deadline)
{
	bool probe = !r->window_ns && r->poll_ns && ++r->unpolled >= r->probe_every;
	uint64_t window = probe ? r->poll_ns : r->window_ns, end = 0, now = 0;
	int left = -1;
	while (window && (!end || now < end)) {
		for (unsigned i = 0; i < LOOKS_PER_CLOCK; i++) {
			if (completed(r)) {
				poll_hit(r);
				return 0;
			}
			relax();
		}
		now = now_ns();
		if (!end)
			end = now + window;
		if (deadline && now >= deadline)
			return -ETIMEDOUT;
	}
	if (probe)
		r->unpolled = 0;
	if (window)
		poll_missed(r, probe);
	if (deadline) {
		now = now_ns();
		if (now >= deadline)
			return -ETIMEDOUT;
		left = (int)((deadline - now) / 1000000u) + 1;
	}
	if (r->epoch != atomic_load(&r->disk->epoch))
		return -ECONNRESET;
	return sleep_for_call(r, left);
}

int scoria_wait(scoria_ring *r, struct scoria_completion *out, unsigned min, unsigned max, int timeout)
{
	uint64_t deadline = 0;
	unsigned n;
	publish(r);
	if (min > max)
		min = max;
	n = reap(r, out, max);
	if (n < min && min - n > r->under_way)
		min = n + r->under_way;
	if (n == 0 && r->under_way && ++r->vain % CHECK_POLLS == 0 && (r->epoch != atomic_load(&r->disk->epoch) || hung_up(r->disk->fd))) {
		int err = recover(r);
		if (err)
			return err;
	}
	if (n < min && timeout >= 0)
		deadline = now_ns() + (uint64_t)timeout * 1000000u;
	while (n < min) {
		int err = await(r, deadline);
		if (err == -ETIMEDOUT)
			break;
		if (err == -ECONNRESET)
			err = recover(r);
		if (err)
			return n ? (int)n : err;
		n += reap(r, out + n, max - n);
	}
	return (int)n;
}

/* ---- synchronous use ---- */

static int one(struct scoria_ring *r, enum scoria_op op, unsigned flags, uint64_t offset, uint64_t length, void *data)
{
	struct scoria_completion c;
	int n = scoria_submit(r, op, flags, offset, length, data, NULL);
	if (n)
		return n;
	while ((n = scoria_wait(r, &c, 1, 1, -1)) == 0)
		;
	if (n < 0)
		return n;
	if (c.result)
		return fail(c.result, "operation %d, %llu bytes at %llu: %s", (int)op, (unsigned long long)length, (unsigned long long)offset,
			    strerror(-c.result));
	return 0;
}

static int transfer(struct scoria_ring *r, enum scoria_op op, unsigned flags, uint8_t *data, size_t length, uint64_t offset)
{
	uint8_t *bounce = r->arena + r->user;
	uint64_t addr;
	bool direct = (uintptr_t)data - (uintptr_t)r->arena < r->user && !offset_of(r, data, length, &addr);
	size_t most = direct ? (size_t)r->disk->info.max_request : BOUNCE_BYTES;
	if (r->under_way)
		return fail(-EBUSY, "asynchronous requests are under way in this ring");
	while (length) {
		size_t n = length < most ? length : most;
		int err;
		if (!direct && op == SCORIA_WRITE)
			memcpy(bounce, data, n);
		err = one(r, op, flags, offset, n, direct ? data : bounce);
		if (err)
			return err;
		if (!direct && op == SCORIA_READ)
			memcpy(data, bounce, n);
		data += n;
		offset += n;
		length -= n;
	}
	return 0;
}

int scoria_pread(scoria_ring *r, void *data, size_t length, uint64_t offset) { return transfer(r, SCORIA_READ, 0, data, length, offset); }

int scoria_pwrite(scoria_ring *r, const void *data, size_t length, uint64_t offset, unsigned flags)
{
	return transfer(r, SCORIA_WRITE, flags, (uint8_t *)(uintptr_t)data, length, offset);
}

static int clear(struct scoria_ring *r, enum scoria_op op, uint64_t length, uint64_t offset, unsigned flags)
{
	uint64_t most = r->disk->info.max_discard;
	if (r->under_way)
		return fail(-EBUSY, "asynchronous requests are under way in this ring");
	while (length) {
		uint64_t n = most && length > most ? most : length;
		int err = one(r, op, flags, offset, n, NULL);
		if (err)
			return err;
		offset += n;
		length -= n;
	}
	return 0;
}

int scoria_flush(scoria_ring *r)
{
	if (r->under_way)
		return fail(-EBUSY, "asynchronous requests are under way in this ring");
	return one(r, SCORIA_FLUSH, 0, 0, 0, NULL);
}

int scoria_discard(scoria_ring *r, uint64_t length, uint64_t offset, unsigned flags) { return clear(r, SCORIA_DISCARD, length, offset, flags); }

int scoria_write_zeroes(scoria_ring *r, uint64_t length, uint64_t offset, unsigned flags)
{
	return clear(r, SCORIA_WRITE_ZEROES, length, offset, flags);
}

/* ---- volumes by name ---- */

/* One request on a connection of its own; body has room for MAX_MESSAGE. */
static ssize_t once(const char *path, uint32_t type, uint64_t value, const char *name, const char *more, uint8_t *body, uint64_t *max_request)
{
	char names[2 * MAX_NAME + 1];
	uint32_t tag = 0;
	int fd;
	ssize_t n;
	if (strlen(name) > MAX_NAME || (more && strlen(more) > MAX_NAME))
		return fail(-EINVAL, "%s: a name has at most %d bytes", name, MAX_NAME);
	fd = connect_to(path ? path : SCORIA_SHM_SOCKET);
	if (fd < 0)
		return fd;
	snprintf(names, sizeof names, "%s%s", name, more ? more : "");
	n = hello(fd, &tag, max_request);
	if (n == 0)
		n = ask(fd, &tag, NULL, type, &value, 8, names, strlen(names), -1, body, NULL, 0);
	close(fd);
	return n;
}

static int simple(const char *path, uint32_t type, uint64_t value, const char *name, const char *more)
{
	uint8_t body[MAX_MESSAGE];
	uint64_t ignored;
	ssize_t n = once(path, type, value, name, more, body, &ignored);
	return n < 0 ? (int)n : 0;
}

int scoria_create(const char *socket, const char *volume, uint64_t size) { return simple(socket, CREATE, size, volume, NULL); }
int scoria_resize(const char *socket, const char *volume, uint64_t size) { return simple(socket, RESIZE, size, volume, NULL); }

int scoria_snapshot(const char *socket, const char *volume, const char *snapshot)
{
	return simple(socket, SNAPSHOT, strlen(volume), volume, snapshot);
}

int scoria_stat(const char *socket, const char *volume, struct scoria_info *info, size_t size)
{
	struct scoria_info found = {0};
	uint8_t body[MAX_MESSAGE];
	ssize_t n = once(socket, STAT, 0, volume, NULL, body, &found.max_request);
	int err = n < 0 ? (int)n : note_volume(&found, body, n);
	if (err)
		return err;
	memset(info, 0, size);
	memcpy(info, &found, size < sizeof found ? size : sizeof found);
	return 0;
}

int scoria_list(const char *socket, int (*each)(void *, const char *), void *opaque)
{
	char name[MAX_NAME + 1] = "";
	uint32_t more = 1;
	while (more) {
		uint8_t body[MAX_MESSAGE], *p = body + 8;
		uint64_t ignored;
		uint32_t count;
		ssize_t n = once(socket, LIST, 0, name, NULL, body, &ignored);
		if (n < 0)
			return (int)n;
		if (n < 8)
			return fail(-EPROTO, "the server's list has %zd bytes", n);
		memcpy(&count, body, 4);
		memcpy(&more, body + 4, 4);
		if (count == 0)
			return 0;
		while (count--) {
			uint16_t length;
			int result;
			if (p + 2 > body + n)
				return fail(-EPROTO, "the server's list ends early");
			memcpy(&length, p, 2);
			if (length > MAX_NAME || p + 2 + length > body + n)
				return fail(-EPROTO, "the server's list ends early");
			memcpy(name, p + 2, length);
			name[length] = 0;
			p += 2 + length;
			result = each(opaque, name);
			if (result)
				return result;
		}
	}
	return 0;
}
