/*
 * nbdkit plugin: nbdkit scoria volume=POOL/VOLUME [socket=PATH]
 *
 * All connections of one nbdkit share the volume: one connection to the daemon
 * for those that write, one for those that only read. Each request borrows a ring
 * while it is carried out, so that as many go on at once as there are rings.
 *
 * Requests may begin and end at any byte. The blocks that a write or a zero covers
 * in part are read, changed and written while no other request changes anything
 * (changes, below): nobody else writes to the volume, since it has one writer. A
 * trim shrinks to whole blocks.
 *
 * Lock order: changes, pool.lock.
 */
#define _GNU_SOURCE
#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "scoria_shm.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL
#define MAX_RINGS 16
#define RING_ENTRIES 4
#define MAX_BLOCK 65536 /* bytes; the logical block is 512 or 4096 so far */

/* pool is an open volume with its rings. */
struct pool {
	pthread_mutex_t lock;
	pthread_cond_t freed;
	scoria_disk *disk;
	uint32_t block;		    /* bytes, a power of two: the volume's logical block */
	unsigned users;		    /* connections */
	scoria_ring *free[MAX_RINGS]; /* rings that nobody uses */
	unsigned free_count, count;
};

static char *volume, *sock;
static struct pool pools[2] = {
	{.lock = PTHREAD_MUTEX_INITIALIZER, .freed = PTHREAD_COND_INITIALIZER},
	{.lock = PTHREAD_MUTEX_INITIALIZER, .freed = PTHREAD_COND_INITIALIZER}, /* read-only */
};

/*
 * Held shared by what changes whole blocks, exclusively by what reads, changes and
 * writes one. Those that wait for the latter go first, or a stream of aligned
 * writes would keep them out.
 */
static pthread_rwlock_t changes = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

static int failed(int err)
{
	nbdkit_error("%s", scoria_error());
	nbdkit_set_error(-err);
	return -1;
}

static int plugin_config(const char *key, const char *value)
{
	if (!strcmp(key, "volume")) {
		free(volume);
		volume = strdup(value);
		return volume ? 0 : -1;
	}
	if (!strcmp(key, "socket")) {
		free(sock);
		sock = nbdkit_absolute_path(value);
		return sock ? 0 : -1;
	}
	nbdkit_error("parameter %s: not known; there are volume= and socket=", key);
	return -1;
}

static int plugin_config_complete(void)
{
	if (volume)
		return 0;
	nbdkit_error("volume=POOL/VOLUME is missing");
	return -1;
}

static void plugin_unload(void)
{
	free(volume);
	free(sock);
}

static int open_disk(struct pool *p, int readonly)
{
	struct scoria_info info;
	int err = scoria_open(&p->disk, sock, volume, readonly ? SCORIA_READ_ONLY : 0);
	if (err) {
		failed(err);
		return err;
	}
	scoria_get_info(p->disk, &info, sizeof info);
	p->block = info.logical_block;
	if (p->block == 0 || p->block > MAX_BLOCK || (p->block & (p->block - 1))) {
		nbdkit_error("volume %s has blocks of %u bytes: must be a power of two up to %u", volume, p->block, MAX_BLOCK);
		nbdkit_set_error(EPROTO);
		scoria_close(p->disk);
		return -EPROTO;
	}
	return 0;
}

static void *plugin_open(int readonly)
{
	struct pool *p = &pools[readonly != 0];
	int err = 0;
	pthread_mutex_lock(&p->lock);
	if (p->users == 0)
		err = open_disk(p, readonly);
	if (!err)
		p->users++;
	pthread_mutex_unlock(&p->lock);
	return err ? NULL : p;
}

/* The last connection gives the volume back, so that others can write to it. */
static void plugin_close(void *handle)
{
	struct pool *p = handle;
	pthread_mutex_lock(&p->lock);
	if (--p->users == 0) {
		while (p->free_count)
			scoria_ring_destroy(p->free[--p->free_count]);
		p->count = 0;
		scoria_close(p->disk);
		p->disk = NULL;
	}
	pthread_mutex_unlock(&p->lock);
}

static int borrow(struct pool *p, scoria_ring **r)
{
	int err = 0;
	pthread_mutex_lock(&p->lock);
	while (p->free_count == 0 && p->count == MAX_RINGS)
		pthread_cond_wait(&p->freed, &p->lock);
	if (p->free_count) {
		*r = p->free[--p->free_count];
	} else {
		err = scoria_ring_create(p->disk, RING_ENTRIES, 0, r);
		if (!err)
			p->count++;
	}
	pthread_mutex_unlock(&p->lock);
	return err;
}

static void give_back(struct pool *p, scoria_ring *r)
{
	pthread_mutex_lock(&p->lock);
	p->free[p->free_count++] = r;
	pthread_cond_signal(&p->freed);
	pthread_mutex_unlock(&p->lock);
}

static unsigned fua(uint32_t flags) { return flags & NBDKIT_FLAG_FUA ? SCORIA_FUA : 0; }

/* job is a request on its ring. data is NULL for zeroes. */
struct job {
	scoria_ring *ring;
	uint32_t block;
	unsigned flags; /* SCORIA_… */
	const uint8_t *data;
	uint64_t offset, count;
};

/* Calls change with a ring. whole: it changes blocks as wholes only. */
static int with_ring(struct pool *p, struct job *j, bool whole, int (*change)(struct job *))
{
	int err;
	if (whole)
		pthread_rwlock_rdlock(&changes);
	else
		pthread_rwlock_wrlock(&changes);
	err = borrow(p, &j->ring);
	if (!err) {
		err = change(j);
		give_back(p, j->ring);
	}
	pthread_rwlock_unlock(&changes);
	return err ? failed(err) : 0;
}

static bool is_whole(const struct job *j) { return (j->offset | j->count) % j->block == 0; }

/* Writes or zeroes whole blocks. */
static int put_blocks(struct job *j, uint64_t offset, uint64_t count)
{
	if (!count)
		return 0;
	if (j->data)
		return scoria_pwrite(j->ring, j->data + (offset - j->offset), count, offset, j->flags & SCORIA_FUA);
	return scoria_write_zeroes(j->ring, count, offset, j->flags);
}

/* Changes n bytes from offset, all of them in one block. */
static int put_part(struct job *j, uint64_t offset, uint64_t n)
{
	uint8_t bytes[MAX_BLOCK];
	uint64_t at = offset % j->block;
	int err = scoria_pread(j->ring, bytes, j->block, offset - at);
	if (err)
		return err;
	if (j->data)
		memcpy(bytes + at, j->data + (offset - j->offset), n);
	else
		memset(bytes + at, 0, n);
	return scoria_pwrite(j->ring, bytes, j->block, offset - at, j->flags & SCORIA_FUA);
}

static int put(struct job *j)
{
	uint64_t end = j->offset + j->count, head = (j->block - j->offset % j->block) % j->block, tail = end % j->block;
	int err = 0;
	if (head > j->count || (head && head == j->count))
		return put_part(j, j->offset, j->count); /* within one block */
	if (head)
		err = put_part(j, j->offset, head);
	if (!err)
		err = put_blocks(j, j->offset + head, j->count - head - tail);
	if (!err && tail)
		err = put_part(j, end - tail, tail);
	return err;
}

/* Reads a range that may begin and end within blocks. */
static int get(scoria_ring *r, uint32_t block, uint8_t *buf, uint64_t count, uint64_t offset)
{
	int err = 0;
	while (!err && count) {
		uint8_t bytes[MAX_BLOCK];
		uint64_t at = offset % block, n = count - count % block;
		if (at || !n) {
			n = count < block - at ? count : block - at;
			err = scoria_pread(r, bytes, block, offset - at);
			if (!err)
				memcpy(buf, bytes + at, n);
		} else {
			err = scoria_pread(r, buf, n, offset);
		}
		buf += n;
		offset += n;
		count -= n;
	}
	return err;
}

static int plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
	struct pool *p = handle;
	scoria_ring *r;
	int err = borrow(p, &r);
	(void)flags;
	if (!err) {
		err = get(r, p->block, buf, count, offset);
		give_back(p, r);
	}
	return err ? failed(err) : 0;
}

static int plugin_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
	struct pool *p = handle;
	struct job j = {.block = p->block, .flags = fua(flags), .data = buf, .offset = offset, .count = count};
	return with_ring(p, &j, is_whole(&j), put);
}

static int plugin_flush(void *handle, uint32_t flags)
{
	struct pool *p = handle;
	scoria_ring *r;
	int err = borrow(p, &r);
	(void)flags;
	if (!err) {
		err = scoria_flush(r);
		give_back(p, r);
	}
	return err ? failed(err) : 0;
}

static int discard(struct job *j) { return j->count ? scoria_discard(j->ring, j->count, j->offset, j->flags) : 0; }

static int plugin_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	struct pool *p = handle;
	uint64_t mask = p->block - 1, begin = (offset + mask) & ~mask, end = (offset + count) & ~mask;
	struct job j = {.block = p->block, .flags = fua(flags), .offset = begin, .count = end > begin ? end - begin : 0};
	return with_ring(p, &j, true, discard);
}

static int plugin_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	struct pool *p = handle;
	struct job j = {.block = p->block, .offset = offset, .count = count};
	j.flags = fua(flags) | (flags & NBDKIT_FLAG_MAY_TRIM ? 0 : SCORIA_NO_UNMAP);
	if ((flags & NBDKIT_FLAG_FAST_ZERO) && !is_whole(&j)) { /* it would not be fast */
		nbdkit_set_error(EOPNOTSUPP);
		return -1;
	}
	return with_ring(p, &j, is_whole(&j), put);
}

static int info_of(void *handle, struct scoria_info *info)
{
	struct pool *p = handle;
	int err = scoria_get_info(p->disk, info, sizeof *info);
	return err ? failed(err) : 0;
}

static int64_t plugin_get_size(void *handle)
{
	struct scoria_info info;
	return info_of(handle, &info) ? -1 : (int64_t)info.size;
}

static int plugin_block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
	struct scoria_info info;
	if (info_of(handle, &info))
		return -1;
	*minimum = 1; /* images have odd sizes */
	*preferred = info.physical_block;
	*maximum = (uint32_t)info.max_request;
	return 0;
}

static int plugin_can_write(void *handle)
{
	struct scoria_info info;
	return info_of(handle, &info) ? -1 : !info.read_only;
}

static int yes(void *handle)
{
	(void)handle;
	return 1;
}

static int plugin_can_fua(void *handle)
{
	(void)handle;
	return NBDKIT_FUA_NATIVE;
}

static struct nbdkit_plugin plugin = {
	.name = "scoria",
	.longname = "Scoria volumes",
	.description = "serves a Scoria volume over shared memory",
	.config = plugin_config,
	.config_complete = plugin_config_complete,
	.config_help = "volume=POOL/VOLUME  (required) The volume.\nsocket=PATH         The daemon's socket, " SCORIA_SHM_SOCKET " if not given.",
	.magic_config_key = "volume",
	.unload = plugin_unload,
	.open = plugin_open,
	.close = plugin_close,
	.get_size = plugin_get_size,
	.block_size = plugin_block_size,
	.can_write = plugin_can_write,
	.can_flush = yes,
	.can_trim = yes,
	.can_zero = yes,
	.can_fast_zero = yes,
	.can_fua = plugin_can_fua,
	.can_multi_conn = yes, /* a flush is of the volume, not of a connection */
	.pread = plugin_pread,
	.pwrite = plugin_pwrite,
	.flush = plugin_flush,
	.trim = plugin_trim,
	.zero = plugin_zero,
};

NBDKIT_REGISTER_PLUGIN(plugin)
