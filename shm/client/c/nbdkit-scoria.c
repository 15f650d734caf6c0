/*
 * nbdkit plugin: nbdkit scoria volume=POOL/VOLUME [socket=PATH]
 *
 * All connections of one nbdkit share the volume: one connection to the daemon
 * for those that write, one for those that only read. Each request borrows a ring
 * while it is carried out, so that as many go on at once as there are rings.
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

/* pool is an open volume with its rings. */
struct pool {
	pthread_mutex_t lock;
	pthread_cond_t freed;
	scoria_disk *disk;
	unsigned users;		    /* connections */
	scoria_ring *free[MAX_RINGS]; /* rings that nobody uses */
	unsigned free_count, count;
};

static char *volume, *sock;
static struct pool pools[2] = {
	{.lock = PTHREAD_MUTEX_INITIALIZER, .freed = PTHREAD_COND_INITIALIZER},
	{.lock = PTHREAD_MUTEX_INITIALIZER, .freed = PTHREAD_COND_INITIALIZER}, /* read-only */
};

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

static void *plugin_open(int readonly)
{
	struct pool *p = &pools[readonly != 0];
	int err = 0;
	pthread_mutex_lock(&p->lock);
	if (p->users == 0)
		err = scoria_open(&p->disk, sock, volume, readonly ? SCORIA_READ_ONLY : 0);
	if (!err)
		p->users++;
	pthread_mutex_unlock(&p->lock);
	if (err) {
		failed(err);
		return NULL;
	}
	return p;
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

/* Carries out CALL, which uses the ring r of handle. */
#define WITH_RING(CALL)                              \
	do {                                         \
		struct pool *p_ = handle;            \
		scoria_ring *r;                      \
		int err_ = borrow(p_, &r);           \
		if (!err_) {                         \
			err_ = (CALL);               \
			give_back(p_, r);            \
		}                                    \
		return err_ ? failed(err_) : 0;      \
	} while (0)

static unsigned fua(uint32_t flags) { return flags & NBDKIT_FLAG_FUA ? SCORIA_FUA : 0; }

static int plugin_pread(void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)flags;
	WITH_RING(scoria_pread(r, buf, count, offset));
}

static int plugin_pwrite(void *handle, const void *buf, uint32_t count, uint64_t offset, uint32_t flags)
{
	WITH_RING(scoria_pwrite(r, buf, count, offset, fua(flags)));
}

static int plugin_flush(void *handle, uint32_t flags)
{
	(void)flags;
	WITH_RING(scoria_flush(r));
}

static int plugin_trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	WITH_RING(scoria_discard(r, count, offset, fua(flags)));
}

static int plugin_zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	WITH_RING(scoria_write_zeroes(r, count, offset, fua(flags) | (flags & NBDKIT_FLAG_MAY_TRIM ? 0 : SCORIA_NO_UNMAP)));
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
	*minimum = info.logical_block;
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
