/*
 * Tests of the C client against a server: selftest SOCKET VOLUME, or
 * selftest SOCKET VOLUME verify ROUNDS for a load that checks what it reads, or
 * selftest SOCKET VOLUME wait TIMES for a write that is waited for, first for 1 ms
 * so many times, and then for good.
 */
#include "scoria_shm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH 32
#define BLOCK 4096

#define CHECK(cond)                                                                                             \
	do {                                                                                                    \
		if (!(cond)) {                                                                                  \
			fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #cond, \
				scoria_error());                                                                \
			exit(1);                                                                                \
		}                                                                                               \
	} while (0)

static uint32_t state = 1;

static uint32_t next_random(void)
{
	state = state * 1664525u + 1013904223u;
	return state >> 8;
}

static void fill(unsigned char *p, size_t n, unsigned seed)
{
	for (size_t i = 0; i < n; i++)
		p[i] = (unsigned char)((i * 7 + seed * 131 + (i >> 8)) & 0xff);
}

static int count_name(void *opaque, const char *name)
{
	int *n = opaque;
	(void)name;
	++*n;
	return 0;
}

static void test_control(const char *path, const char *volume)
{
	struct scoria_info info;
	scoria_disk *d;
	int n = 0;
	CHECK(scoria_open(&d, path, "default/none", 0) == -ENOENT);
	CHECK(scoria_open(&d, path, "", 0) == -EINVAL);
	CHECK(scoria_open(&d, "/nowhere/shm.sock", volume, 0) == -ECONNREFUSED);
	CHECK(scoria_create(path, "default/made-in-c", 1 << 20) == 0);
	CHECK(scoria_resize(path, "default/made-in-c", 2 << 20) == 0);
	CHECK(scoria_stat(path, "default/made-in-c", &info, sizeof info) == 0);
	CHECK(info.size == 2 << 20 && !strcmp(info.name, "default/made-in-c") && info.max_request >= 1 << 20);
	CHECK(scoria_stat(path, "default/none", &info, sizeof info) == -ENOENT);
	CHECK(scoria_list(path, count_name, &n) == 0 && n >= 2);
	CHECK(scoria_snapshot(path, "default/none", "s") < 0);
}

static void test_sync(scoria_disk *d, scoria_ring *r)
{
	size_t n = 1 << 20;
	unsigned char *p = malloc(n), *q = malloc(n);
	struct scoria_info info;
	CHECK(p && q);
	CHECK(scoria_get_info(d, &info, sizeof info) == 0);
	fill(p, n, 3);
	CHECK(scoria_pwrite(r, p, n, 512, 0) == 0);
	CHECK(scoria_pwrite(r, p, 512, 0, SCORIA_FUA) == 0);
	CHECK(scoria_flush(r) == 0);
	CHECK(scoria_pread(r, q, n, 512) == 0 && !memcmp(p, q, n));
	CHECK(scoria_discard(r, BLOCK, BLOCK, 0) == 0);
	CHECK(scoria_write_zeroes(r, BLOCK, 3 * BLOCK, SCORIA_NO_UNMAP) == 0);
	CHECK(scoria_pread(r, q, 4 * BLOCK, 0) == 0);
	for (int i = 0; i < BLOCK; i++)
		CHECK(q[BLOCK + i] == 0 && q[3 * BLOCK + i] == 0);
	CHECK(!memcmp(q + 2 * BLOCK, p + 2 * BLOCK - 512, BLOCK));
	CHECK(scoria_pread(r, q, BLOCK, info.size) == -ENOSPC);
	CHECK(scoria_pread(r, q, BLOCK, 1) == -EINVAL);
	free(p);
	free(q);
}

static void test_async(scoria_ring *r)
{
	size_t bytes;
	unsigned char *arena = scoria_ring_arena(r, &bytes);
	struct scoria_completion c[DEPTH];
	unsigned char want[BLOCK];
	CHECK(bytes >= DEPTH * BLOCK);
	for (unsigned round = 0; round < 100; round++) {
		for (unsigned kind = 0; kind < 2; kind++) {
			for (unsigned i = 0; i < DEPTH; i++) {
				unsigned char *p = arena + i * BLOCK;
				struct iovec pieces[3] = {{p + 1024, 512}, {p, 1024}, {p + 1536, BLOCK - 1536}};
				if (kind == 0)
					fill(p, BLOCK, round + i);
				else
					memset(p, 0xee, BLOCK);
				if (i % 2)
					CHECK(scoria_submitv(r, kind ? SCORIA_READ : SCORIA_WRITE, 0, i * BLOCK, pieces, 3, p) == 0);
				else
					CHECK(scoria_submit(r, kind ? SCORIA_READ : SCORIA_WRITE, 0, i * BLOCK, BLOCK, p, p) == 0);
			}
			CHECK(scoria_submit(r, SCORIA_FLUSH, 0, 0, 0, NULL, NULL) == -EAGAIN);
			CHECK(scoria_wait(r, c, DEPTH, DEPTH, -1) == DEPTH);
			for (unsigned i = 0; i < DEPTH; i++)
				CHECK(c[i].result == 0);
			if (kind == 0)
				memset(arena, 0, DEPTH * BLOCK);
		}
		for (unsigned i = 0; i < DEPTH; i++) {
			fill(want, BLOCK, round + i);
			CHECK(!memcmp(arena + i * BLOCK, want, BLOCK));
		}
	}
	CHECK(scoria_submit(r, SCORIA_WRITE, 0, 0, BLOCK, want, NULL) == -EINVAL); /* not in the arena */
	CHECK(scoria_submit(r, SCORIA_FLUSH, 0, 0, 0, NULL, want) == 0);
	CHECK(scoria_pread(r, want, BLOCK, 0) == -EBUSY);
	CHECK(scoria_wait(r, c, 5, DEPTH, -1) == 1 && c[0].cookie == want && c[0].result == 0);
	CHECK(scoria_wait(r, c, 1, 1, 10) == 0);
}

/* A load of DEPTH requests at once; each block holds the last round it was written in. */
static void verify(scoria_disk *d, scoria_ring *r, unsigned rounds)
{
	enum { BLOCKS = 2048 };
	unsigned *model = calloc(BLOCKS, sizeof *model);
	unsigned char *arena = scoria_ring_arena(r, NULL), want[BLOCK];
	struct { unsigned block, seed; int write, busy; } job[DEPTH];
	struct scoria_info info;
	memset(job, 0, sizeof job);
	CHECK(model);
	CHECK(scoria_write_zeroes(r, (uint64_t)BLOCKS * BLOCK, 0, 0) == 0);
	for (unsigned done = 0, sent = 0; done < rounds;) {
		struct scoria_completion c[DEPTH];
		int n;
		for (unsigned i = 0; i < DEPTH && sent < rounds; i++) {
			unsigned block = next_random() % (BLOCKS / DEPTH) * DEPTH + i; /* each job its own */
			if (job[i].busy)
				continue;
			job[i].block = block;
			job[i].write = next_random() % 2;
			job[i].busy = 1;
			if (job[i].write) {
				job[i].seed = ++sent;
				fill(arena + i * BLOCK, BLOCK, job[i].seed);
			} else {
				sent++;
			}
			CHECK(scoria_submit(r, job[i].write ? SCORIA_WRITE : SCORIA_READ, 0, (uint64_t)block * BLOCK, BLOCK, arena + i * BLOCK,
					    &job[i]) == 0);
		}
		n = scoria_wait(r, c, 1, DEPTH, -1);
		CHECK(n > 0);
		for (int k = 0; k < n; k++) {
			unsigned i = (unsigned)((char *)c[k].cookie - (char *)job) / (unsigned)sizeof job[0];
			CHECK(c[k].result == 0);
			if (job[i].write) {
				model[job[i].block] = job[i].seed;
			} else {
				if (model[job[i].block])
					fill(want, BLOCK, model[job[i].block]);
				else
					memset(want, 0, BLOCK);
				CHECK(!memcmp(arena + i * BLOCK, want, BLOCK));
			}
			job[i].busy = 0;
			done++;
		}
	}
	scoria_get_info(d, &info, sizeof info);
	printf("%u operations, %llu reconnects\n", rounds, (unsigned long long)info.reconnects);
	free(model);
}

static void test_wait(scoria_ring *r, int times)
{
	struct scoria_completion c;
	struct scoria_ring_stats st;
	CHECK(scoria_submit(r, SCORIA_WRITE, 0, 0, BLOCK, scoria_ring_arena(r, NULL), NULL) == 0);
	for (int i = 0; i < times; i++)
		CHECK(scoria_wait(r, &c, 1, 1, 1) == 0);
	puts("waiting");
	fflush(stdout);
	CHECK(scoria_wait(r, &c, 1, 1, -1) == 1 && c.result == 0);
	scoria_ring_get_stats(r, &st, sizeof st);
	printf("hits %llu misses %llu sleeps %llu\n", (unsigned long long)st.poll_hits, (unsigned long long)st.poll_misses,
	       (unsigned long long)st.sleeps);
}

int main(int argc, char **argv)
{
	scoria_disk *d, *second;
	scoria_ring *r, *other;
	if (argc < 3)
		return 2;
	CHECK(scoria_open(&d, argv[1], argv[2], 0) == 0);
	CHECK(scoria_ring_create(d, DEPTH, DEPTH * BLOCK, &r) == 0);
	if (argc > 4 && !strcmp(argv[3], "wait")) {
		test_wait(r, atoi(argv[4]));
	} else if (argc > 4) {
		verify(d, r, (unsigned)atoi(argv[4]));
	} else {
		CHECK(scoria_open(&second, argv[1], argv[2], 0) == -EBUSY);
		CHECK(scoria_open(&second, argv[1], argv[2], SCORIA_READ_ONLY) == 0);
		CHECK(scoria_ring_create(second, 3, 0, &other) == -EINVAL);
		CHECK(scoria_ring_create(second, 4, 0, &other) == 0);
		CHECK(scoria_flush(other) == 0 && scoria_discard(other, BLOCK, 0, 0) == -EROFS);
		scoria_ring_destroy(other);
		scoria_close(second);
		test_control(argv[1], argv[2]);
		test_sync(d, r);
		test_async(r);
		scoria_ring_set_poll(r, 0);
		test_async(r);
	}
	scoria_ring_destroy(r);
	scoria_close(d);
	return 0;
}
