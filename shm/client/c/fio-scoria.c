/*
 * fio engine: fio --ioengine=external:/path/scoria-fio.so --volume=POOL/VOLUME
 *
 * Options: volume, scoria_socket, poll_us. Jobs of one fio share the volume, a
 * ring each, since a volume has one writer: so jobs are threads. fio's buffers lie
 * in the ring's arena, and nothing is copied on this side.
 */
#include "fio.h"
#include "optgroup.h"

#include "scoria_shm.h"

struct scoria_options {
	void *pad; /* fio keeps its own here */
	char *volume;
	char *socket;
	unsigned int poll_us;
};

static struct fio_option options[] = {
	{
		.name = "volume",
		.lname = "Scoria volume",
		.type = FIO_OPT_STR_STORE,
		.off1 = offsetof(struct scoria_options, volume),
		.help = "POOL/VOLUME",
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{
		.name = "scoria_socket",
		.lname = "Scoria socket",
		.type = FIO_OPT_STR_STORE,
		.off1 = offsetof(struct scoria_options, socket),
		.help = "The daemon's shared-memory socket",
		.def = SCORIA_SHM_SOCKET,
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{
		.name = "poll_us",
		.lname = "Poll time",
		.type = FIO_OPT_INT,
		.off1 = offsetof(struct scoria_options, poll_us),
		.help = "Microseconds to poll before sleeping",
		.def = "50",
		.category = FIO_OPT_C_ENGINE,
		.group = FIO_OPT_G_INVALID,
	},
	{.name = NULL},
};

/* shared is a volume that jobs of this process have open. */
struct shared {
	struct shared *next;
	scoria_disk *disk;
	char *volume;
	bool read_only;
	unsigned users;
};

static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static struct shared *all_shared;

struct scoria_data {
	struct shared *shared;
	scoria_ring *ring;
	struct scoria_completion *done;
	unsigned done_count;
};

static int report(const char *what)
{
	log_err("fio: scoria: %s: %s\n", what, scoria_error());
	return 1;
}

static struct shared *take_shared(const char *socket, const char *volume, bool read_only)
{
	struct shared *s;
	pthread_mutex_lock(&shared_lock);
	for (s = all_shared; s; s = s->next)
		if (!strcmp(s->volume, volume) && s->read_only == read_only)
			break;
	if (!s) {
		s = calloc(1, sizeof *s);
		if (scoria_open(&s->disk, socket, volume, read_only ? SCORIA_READ_ONLY : 0)) {
			free(s);
			s = NULL;
		} else {
			s->volume = strdup(volume);
			s->read_only = read_only;
			s->next = all_shared;
			all_shared = s;
		}
	}
	if (s)
		s->users++;
	pthread_mutex_unlock(&shared_lock);
	return s;
}

static void drop_shared(struct shared *s)
{
	struct shared **p;
	pthread_mutex_lock(&shared_lock);
	if (--s->users == 0) {
		for (p = &all_shared; *p != s; p = &(*p)->next)
			;
		*p = s->next;
		scoria_close(s->disk);
		free(s->volume);
		free(s);
	}
	pthread_mutex_unlock(&shared_lock);
}

/* Learns the volume's size before the jobs begin. */
static int engine_setup(struct thread_data *td)
{
	struct scoria_options *o = td->eo;
	struct scoria_info info;
	struct fio_file *f;
	if (!o->volume) {
		log_err("fio: scoria: volume=POOL/VOLUME is missing\n");
		return 1;
	}
	td->o.use_thread = 1;
	if (!td->files_index) {
		add_file(td, o->volume, 0, 0);
		td->o.nr_files = td->o.nr_files ?: 1;
		td->o.open_files++;
	}
	if (scoria_stat(o->socket, o->volume, &info, sizeof info))
		return report(o->volume);
	f = td->files[0];
	f->real_file_size = info.size;
	return 0;
}

static unsigned ring_entries(struct thread_data *td)
{
	unsigned n = 1;
	while (n < td->o.iodepth)
		n *= 2;
	return n;
}

/* Makes the job's ring, with an arena for fio's buffers. */
static int make_ring(struct thread_data *td, size_t bytes)
{
	struct scoria_options *o = td->eo;
	struct scoria_data *d = calloc(1, sizeof *d);
	d->shared = take_shared(o->socket, o->volume, !td_write(td) && !td_trim(td));
	if (!d->shared) {
		free(d);
		return report(o->volume);
	}
	if (scoria_ring_create(d->shared->disk, ring_entries(td), bytes, &d->ring)) {
		drop_shared(d->shared);
		free(d);
		return report("ring");
	}
	scoria_ring_set_poll(d->ring, o->poll_us);
	d->done = calloc(ring_entries(td), sizeof *d->done);
	td->io_ops_data = d;
	return 0;
}

static int engine_iomem_alloc(struct thread_data *td, size_t bytes)
{
	struct scoria_data *d;
	if (make_ring(td, bytes))
		return 1;
	d = td->io_ops_data;
	td->orig_buffer = scoria_ring_arena(d->ring, NULL);
	return 0;
}

static void engine_cleanup(struct thread_data *td)
{
	struct scoria_data *d = td->io_ops_data;
	if (!d)
		return;
	scoria_ring_destroy(d->ring);
	drop_shared(d->shared);
	free(d->done);
	free(d);
	td->io_ops_data = NULL;
}

/* The buffers go with the ring, in engine_cleanup. */
static void engine_iomem_free(struct thread_data *td) { td->orig_buffer = NULL; }

/* It comes before iomem_alloc, which does not come to jobs that only trim. */
static int engine_init(struct thread_data *td) { return td_read(td) || td_write(td) ? 0 : make_ring(td, 0); }

static enum fio_q_status engine_queue(struct thread_data *td, struct io_u *io_u)
{
	struct scoria_data *d = td->io_ops_data;
	enum scoria_op op;
	int err;
	fio_ro_check(td, io_u);
	switch (io_u->ddir) {
	case DDIR_READ:
		op = SCORIA_READ;
		break;
	case DDIR_WRITE:
		op = SCORIA_WRITE;
		break;
	case DDIR_TRIM:
		op = SCORIA_DISCARD;
		break;
	default:
		op = SCORIA_FLUSH;
		break;
	}
	err = scoria_submit(d->ring, op, 0, op == SCORIA_FLUSH ? 0 : io_u->offset, op == SCORIA_FLUSH ? 0 : io_u->xfer_buflen, io_u->xfer_buf, io_u);
	if (err == -EAGAIN)
		return FIO_Q_BUSY;
	if (err) {
		io_u->error = -err;
		td_verror(td, io_u->error, "scoria_submit");
		return FIO_Q_COMPLETED;
	}
	return FIO_Q_QUEUED;
}

static int engine_commit(struct thread_data *td)
{
	struct scoria_data *d = td->io_ops_data;
	return scoria_kick(d->ring);
}

static int engine_getevents(struct thread_data *td, unsigned int min, unsigned int max, const struct timespec *t)
{
	struct scoria_data *d = td->io_ops_data;
	int timeout = t ? (int)(t->tv_sec * 1000 + t->tv_nsec / 1000000) : -1;
	return scoria_wait(d->ring, d->done, min, max, timeout);
}

static struct io_u *engine_event(struct thread_data *td, int event)
{
	struct scoria_data *d = td->io_ops_data;
	struct io_u *io_u = d->done[event].cookie;
	io_u->error = -d->done[event].result;
	io_u->resid = 0;
	return io_u;
}

static int engine_open_file(struct thread_data *td, struct fio_file *f) { return 0; }
static int engine_close_file(struct thread_data *td, struct fio_file *f) { return 0; }
static int engine_invalidate(struct thread_data *td, struct fio_file *f) { return 0; }

struct ioengine_ops ioengine = {
	.name = "scoria",
	.version = FIO_IOOPS_VERSION,
	.flags = FIO_DISKLESSIO | FIO_NOEXTEND | FIO_NODISKUTIL | FIO_RAWIO,
	.setup = engine_setup,
	.init = engine_init,
	.cleanup = engine_cleanup,
	.queue = engine_queue,
	.commit = engine_commit,
	.getevents = engine_getevents,
	.event = engine_event,
	.iomem_alloc = engine_iomem_alloc,
	.iomem_free = engine_iomem_free,
	.open_file = engine_open_file,
	.close_file = engine_close_file,
	.invalidate = engine_invalidate,
	.options = options,
	.option_struct_size = sizeof(struct scoria_options),
};
