package disk

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"
	"time"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

const (
	defaultReopenAfter = time.Second
	// maxReopenAfter bounds the wait between attempts; a disk that has worked for as
	// long since the last one is tried soon again.
	maxReopenAfter = time.Minute
	// maxStuck bounds what stays of key-value stores that got stuck: each keeps up to
	// CacheBytes and four tables of memTableBytes.
	maxStuck = 16
)

// Supervised is an ASD whose disk is opened anew when it has failed: when a test
// write succeeds, after waits that double. See "Failure" in the package doc. Safe from
// any goroutine.
//
// While the disk is failed, reads go to it as it is. While it is being opened, and
// if that fails, all calls but Stats and Close return asd.ErrUnavailable.
type Supervised struct {
	fs   vfs.FS
	dir  string
	opts Options
	id   string

	serving atomic.Pointer[served]
	stop    chan struct{} // closed by Close
	done    chan struct{} // closed when the supervisor has ended
	once    sync.Once

	mu       sync.Mutex // a leaf; guards what follows
	last     asd.Stats  // of the disk that was closed last
	plan     string     // what is being done about a failure; "" if there is none
	reopened uint64
	failure  string // that made it open the disk anew the last time

	// The supervisor's own.
	maxWait time.Duration // between attempts
	wait    time.Duration // before the next attempt
	since   time.Time     // the disk was opened
	stuck   int           // key-value stores
}

// served is what calls go to.
type served struct {
	disk *Disk // nil: none is open
	why  error // why none is
}

var (
	_ asd.Client      = (*Supervised)(nil)
	_ asd.BlockReader = (*Supervised)(nil)
	_ asd.Adopter     = (*Supervised)(nil)
)

// Supervise opens an ASD as Open does, and opens it anew whenever it has failed.
func Supervise(fsys vfs.FS, dir string, opts Options) (*Supervised, error) {
	d, err := Open(fsys, dir, opts)
	if err != nil {
		return nil, err
	}
	if opts.ReopenAfter == 0 {
		opts.ReopenAfter = defaultReopenAfter
	}
	opts.ID = d.ID() // the same one must be there again
	opts.Salvage = false
	s := &Supervised{fs: fsys, dir: dir, opts: opts, id: d.ID(), stop: make(chan struct{}), done: make(chan struct{}),
		maxWait: max(maxReopenAfter, opts.ReopenAfter), wait: opts.ReopenAfter, since: time.Now()}
	s.serving.Store(&served{disk: d})
	go s.supervise(d)
	return s, nil
}

// supervise ends with Close.
func (s *Supervised) supervise(d *Disk) {
	defer close(s.done)
	for d != nil {
		select {
		case <-d.failed:
			d = s.revive(d)
		case <-s.stop:
			return
		}
	}
}

// revive opens the disk anew until that works: nil if it is closed meanwhile.
func (s *Supervised) revive(d *Disk) *Disk {
	cause := d.failErr()
	if time.Since(s.since) > s.maxWait {
		s.wait = s.opts.ReopenAfter
	}
	news := "the disk failed"
	for attempt := 1; ; attempt++ {
		if s.stuck >= maxStuck {
			s.setPlan(fmt.Sprintf("%s; what is left of %d attempts to use it fills the memory: replace the disk, or restart the daemon", news, s.stuck))
			<-s.stop
			return nil
		}
		next := time.Now().Add(s.wait)
		s.setPlan(fmt.Sprintf("%s; attempt %d to open it anew at %s", news, attempt, next.UTC().Format(time.TimeOnly)))
		t := time.NewTimer(s.wait)
		select {
		case <-t.C:
		case <-s.stop:
			t.Stop()
			return nil
		}
		s.wait = min(2*s.wait, s.maxWait)
		err := testWrite(s.fs, s.dir)
		if err == nil && d != nil {
			s.abandon(d, cause)
			d = nil
		}
		var again *Disk
		if err == nil {
			if again, err = Open(s.fs, s.dir, s.opts); errors.Is(err, errStuck) {
				s.stuck++
			}
		}
		if err == nil {
			s.resume(again, cause)
			return again
		}
		if d == nil {
			s.serving.Store(&served{why: err})
		}
		news = err.Error()
		s.opts.Log.Warn().Err(err).Str("asd_dir", s.dir).Int("attempt", attempt).Msg("a failed disk can't be opened anew yet")
	}
}

// abandon takes a failed disk out of use and closes it.
func (s *Supervised) abandon(d *Disk, cause error) {
	last, err := d.Stats(context.Background())
	s.mu.Lock()
	if err == nil {
		s.last = last
	}
	s.mu.Unlock()
	s.serving.Store(&served{why: fmt.Errorf("it is being opened anew: %w", cause)})
	if err := d.Close(); err != nil {
		s.opts.Log.Info().Err(err).Str("asd_dir", s.dir).Msg("the failed disk was not closed in order")
	}
	if d.isStuck() {
		s.stuck++
	}
}

func (s *Supervised) resume(d *Disk, cause error) {
	s.mu.Lock()
	s.reopened++
	s.failure, s.plan = cause.Error(), ""
	s.mu.Unlock()
	s.since = time.Now()
	s.serving.Store(&served{disk: d})
	s.opts.Log.Info().Str("asd_dir", s.dir).Msg("the disk was opened anew and takes writes again")
}

func (s *Supervised) setPlan(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.plan = text
}

// testWrite finds out whether the disk takes and keeps writes: what was written is
// dropped from the page cache before it is read back. Opening the disk then writes to
// the key-value store.
func testWrite(fsys vfs.FS, dir string) error {
	name := path.Join(dir, "probe")
	err := writeProbe(fsys, name)
	if err == nil {
		err = fsys.SyncDir(dir)
	}
	if err == nil {
		err = fsys.Remove(name)
	}
	if err != nil {
		return fmt.Errorf("test write: %w", err)
	}
	return nil
}

func writeProbe(fsys vfs.FS, name string) error {
	if err := fsys.Remove(name); err != nil && !isNotExist(err) {
		return err
	}
	f, err := fsys.Open(name, vfs.Create|vfs.Exclusive)
	if err != nil {
		return err
	}
	defer f.Close()
	wrote, read := make([]byte, filePage), make([]byte, filePage)
	now := time.Now().UnixNano()
	for i := range wrote {
		wrote[i] = byte(now>>(i%8*8)) + byte(i>>3)
	}
	if _, err := f.WriteAt(wrote, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.DropCache(0, filePage); err != nil {
		return err
	}
	if _, err := f.ReadAt(read, 0); err != nil {
		return err
	}
	if string(read) != string(wrote) {
		return errors.New("what was written is not what is read back")
	}
	return nil
}

// use calls fn with the disk that is open.
func (s *Supervised) use(fn func(d *Disk) error) error {
	now := s.serving.Load()
	if now.disk == nil {
		return fmt.Errorf("%w: %w", asd.ErrUnavailable, now.why)
	}
	err := fn(now.disk)
	if errors.Is(err, asd.ErrClosed) && s.serving.Load() != now { // it was closed before fn had any effect
		return fmt.Errorf("%w: the disk is being opened anew", asd.ErrUnavailable)
	}
	return err
}

// ID returns the ASD's UUID.
func (s *Supervised) ID() string { return s.id }

// Get implements asd.Client.
func (s *Supervised) Get(ctx context.Context, key string, pri asd.Priority) (v asd.Value, err error) {
	err = s.use(func(d *Disk) error { v, err = d.Get(ctx, key, pri); return err })
	return v, err
}

// MultiGet implements asd.Client.
func (s *Supervised) MultiGet(ctx context.Context, keys []string, pri asd.Priority) (list []asd.Result, err error) {
	err = s.use(func(d *Disk) error { list, err = d.MultiGet(ctx, keys, pri); return err })
	return list, err
}

// ReadAt implements asd.Client.
func (s *Supervised) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (info asd.ReadInfo, err error) {
	err = s.use(func(d *Disk) error { info, err = d.ReadAt(ctx, key, p, off, pri); return err })
	return info, err
}

// ReadBlocks implements asd.BlockReader.
func (s *Supervised) ReadBlocks(ctx context.Context, key string, buf []byte, off, size int64, pri asd.Priority) (b []byte, info asd.ReadInfo, err error) {
	err = s.use(func(d *Disk) error { b, info, err = d.ReadBlocks(ctx, key, buf, off, size, pri); return err })
	return b, info, err
}

// Range implements asd.Client.
func (s *Supervised) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (r asd.RangeResult, err error) {
	err = s.use(func(d *Disk) error { r, err = d.Range(ctx, req, pri); return err })
	return r, err
}

// Exists implements asd.Client.
func (s *Supervised) Exists(ctx context.Context, keys []string, pri asd.Priority) (list []asd.Info, err error) {
	err = s.use(func(d *Disk) error { list, err = d.Exists(ctx, keys, pri); return err })
	return list, err
}

// Apply implements asd.Client.
func (s *Supervised) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	return s.use(func(d *Disk) error { return d.Apply(ctx, asserts, updates, pri) })
}

// Adopt implements asd.Adopter.
func (s *Supervised) Adopt(ctx context.Context, file string, parts []asd.FilePart, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	return s.use(func(d *Disk) error { return d.Adopt(ctx, file, parts, asserts, updates, pri) })
}

// Epochs implements asd.Client.
func (s *Supervised) Epochs(ctx context.Context, after string) (list []asd.NamespaceEpoch, more bool, err error) {
	err = s.use(func(d *Disk) error { list, more, err = d.Epochs(ctx, after); return err })
	return list, more, err
}

// Verify implements asd.Client.
func (s *Supervised) Verify(ctx context.Context, req asd.VerifyRequest) (r asd.VerifyResult, err error) {
	err = s.use(func(d *Disk) error { r, err = d.Verify(ctx, req); return err })
	return r, err
}

// Stats implements asd.Client. While no disk is open the figures are the last ones,
// and Failed says why.
func (s *Supervised) Stats(ctx context.Context) (asd.Stats, error) {
	now := s.serving.Load()
	var st asd.Stats
	var err error
	if now.disk != nil {
		st, err = now.disk.Stats(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.disk == nil || errors.Is(err, asd.ErrClosed) && s.serving.Load() != now {
		st, err = s.last, nil
		if st.Failed == "" {
			st.Failed = "it is being opened anew"
		}
	}
	if st.Failed != "" && s.plan != "" {
		st.Failed += " (" + s.plan + ")"
	}
	st.Reopened, st.LastFailure = s.reopened, s.failure
	return st, err
}

// Close ends the supervision and closes the disk, as Disk.Close does. It waits for an
// attempt to open the disk that is under way.
func (s *Supervised) Close() error {
	s.once.Do(func() { close(s.stop) })
	<-s.done
	now := s.serving.Load()
	if now.disk == nil {
		s.serving.CompareAndSwap(now, &served{why: asd.ErrClosed})
		return nil
	}
	return now.disk.Close()
}
