/*
 * scoria_shm.h: reads and writes Scoria's volumes through rings in shared memory.
 *
 * A disk is an open volume, a ring a way to it. A ring is used by one thread at a
 * time; several threads take a ring each. A disk's other functions may be called
 * from any thread. All functions that return int return 0, or a count, or a
 * negative errno value; scoria_error() has the words.
 *
 * When the daemon dies, calls wait until it is back and submit again what had no
 * completion; see scoria_set_reconnect().
 *
 * The ABI is that of version 1 for good: structures only grow at their end, and
 * whoever fills them in is told their size.
 */
#ifndef SCORIA_SHM_H
#define SCORIA_SHM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SCORIA_SHM_VERSION 1
#define SCORIA_SHM_SOCKET "/run/scoria/shm.sock"

#if defined(__GNUC__)
#define SCORIA_API __attribute__((visibility("default")))
#else
#define SCORIA_API
#endif

typedef struct scoria_disk scoria_disk;
typedef struct scoria_ring scoria_ring;

enum scoria_op {
	SCORIA_READ = 0,
	SCORIA_WRITE = 1,
	SCORIA_FLUSH = 2,
	SCORIA_DISCARD = 3,
	SCORIA_WRITE_ZEROES = 4
};

/* Flags of operations. */
#define SCORIA_FUA 1      /* done only when it would survive a loss of power */
#define SCORIA_NO_UNMAP 2 /* write-zeroes: keep the space provisioned */

/* Flags of scoria_open. */
#define SCORIA_READ_ONLY 1

/* Pieces of one request of scoria_submitv. */
#define SCORIA_MAX_PIECES 64

struct scoria_info {
	uint64_t size;              /* bytes */
	uint64_t max_discard;       /* bytes of one discard or write-zeroes; 0: no limit */
	uint64_t max_request;       /* bytes of one read or write */
	uint32_t logical_block;     /* bytes: offsets and lengths are multiples of it */
	uint32_t physical_block;    /* bytes */
	uint32_t discard_alignment; /* bytes */
	uint32_t read_only;
	uint64_t reconnects; /* how often the daemon was gone and came back */
	char serial[32];
	char name[256];
};

struct scoria_completion {
	void *cookie; /* as submitted */
	int result;   /* 0 or a negative errno value */
};

struct scoria_ring_stats {
	uint64_t poll_hits;   /* waits that polling made short */
	uint64_t poll_misses; /* waits that polling did not end */
	uint64_t sleeps;      /* times that the thread slept in the kernel */
};

/* The words for this thread's last error. Never NULL. */
SCORIA_API const char *scoria_error(void);

/* Opens POOL/VOLUME. socket may be NULL: SCORIA_SHM_SOCKET. */
SCORIA_API int scoria_open(scoria_disk **disk, const char *socket, const char *volume, unsigned flags);
/* Closes a disk whose rings are destroyed. */
SCORIA_API void scoria_close(scoria_disk *disk);
/* Describes the disk; size is sizeof(struct scoria_info). */
SCORIA_API int scoria_get_info(scoria_disk *disk, struct scoria_info *info, size_t size);
/* How long calls wait for a daemon that is gone, in ms; negative, the default: for good. */
SCORIA_API void scoria_set_reconnect(scoria_disk *disk, int milliseconds);

/* Makes a ring of entries (a power of two) and an arena of bytes for data. */
SCORIA_API int scoria_ring_create(scoria_disk *disk, unsigned entries, size_t arena, scoria_ring **ring);
/* Ends a ring. What is under way is not waited for; what it did is not known. */
SCORIA_API void scoria_ring_destroy(scoria_ring *ring);
/* The arena: memory that data goes to and from without a copy. It stays where it is. */
SCORIA_API void *scoria_ring_arena(scoria_ring *ring, size_t *bytes);
/*
 * Longest time that scoria_wait polls before it sleeps, in microseconds; 50 at
 * first, 0: never. It polls that long only while that finds completions.
 */
SCORIA_API void scoria_ring_set_poll(scoria_ring *ring, unsigned microseconds);
/* How the ring's waits went; size is sizeof(struct scoria_ring_stats). From the ring's thread. */
SCORIA_API void scoria_ring_get_stats(scoria_ring *ring, struct scoria_ring_stats *stats, size_t size);

/*
 * Asynchronous use. scoria_submit adds a request; the server sees it after
 * scoria_kick or scoria_wait. data lies in the arena. -EAGAIN: the ring is full,
 * wait first.
 */
SCORIA_API int scoria_submit(scoria_ring *ring, enum scoria_op op, unsigned flags, uint64_t offset, uint64_t length, void *data,
			     void *cookie);
/* The same with data in several pieces of the arena. */
SCORIA_API int scoria_submitv(scoria_ring *ring, enum scoria_op op, unsigned flags, uint64_t offset, const struct iovec *pieces,
			      unsigned count, void *cookie);
SCORIA_API int scoria_kick(scoria_ring *ring);
/*
 * Waits for at least min completions, at most max, or for timeout ms (negative:
 * for good), and returns how many there are in out.
 */
SCORIA_API int scoria_wait(scoria_ring *ring, struct scoria_completion *out, unsigned min, unsigned max, int timeout);

/*
 * Synchronous use, with any memory; what lies in the arena is not copied. -EBUSY
 * if asynchronous requests are under way.
 */
SCORIA_API int scoria_pread(scoria_ring *ring, void *data, size_t length, uint64_t offset);
SCORIA_API int scoria_pwrite(scoria_ring *ring, const void *data, size_t length, uint64_t offset, unsigned flags);
SCORIA_API int scoria_flush(scoria_ring *ring);
SCORIA_API int scoria_discard(scoria_ring *ring, uint64_t length, uint64_t offset, unsigned flags);
SCORIA_API int scoria_write_zeroes(scoria_ring *ring, uint64_t length, uint64_t offset, unsigned flags);

/* Volumes by name, each over a connection of its own. */
SCORIA_API int scoria_create(const char *socket, const char *volume, uint64_t size);
SCORIA_API int scoria_resize(const char *socket, const char *volume, uint64_t size);
SCORIA_API int scoria_stat(const char *socket, const char *volume, struct scoria_info *info, size_t size);
SCORIA_API int scoria_snapshot(const char *socket, const char *volume, const char *snapshot);
/* Calls each with the volumes' names, sorted, until it returns other than 0, which is returned. */
SCORIA_API int scoria_list(const char *socket, int (*each)(void *opaque, const char *volume), void *opaque);

#ifdef __cplusplus
}
#endif

#endif
