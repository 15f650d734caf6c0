package proxy

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"scoria/alba"
	"scoria/alba/asd"
	"scoria/alba/erasure"
	"scoria/alba/slab"
)

// An upload has chunks of so many bytes in memory, parity included: at least minWindow
// of them, so that one is encoded while another is sent, and as many as keep the disks
// busy while fragments are synced and committed.
const (
	windowBytes = 96 << 20
	minWindow   = 2
	maxWindow   = 32
)

// windowChunks is how many chunks of an upload are in memory at once.
func windowChunks(l alba.Layout) int {
	return int(min(maxWindow, max(minWindow, windowBytes/l.EncodedBytes())))
}

// watchEvery is how often an upload that waits looks at its devices' health.
const watchEvery = 250 * time.Millisecond

// sharedChunk is a chunk that several shards are sending.
type sharedChunk struct {
	*erasure.Chunk
	u      *upload
	memory *slab.Slab // nil if the heap has it
	bytes  int64
	refs   atomic.Int32
}

// acquire waits for the memory of a chunk. Meanwhile shards that lag behind c others
// for longer than a grace are given up, and those whose device is found to be down:
// they may hold this upload's window, or with those of others all the memory.
func (u *upload) acquire(ctx context.Context) (*sharedChunk, error) {
	begun := time.Now()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var lag <-chan time.Time
	window := u.window
	n := min(u.m.Layout().EncodedBytes(), u.p.opts.MemoryBytes)
	var memory chan error // the end of the wait for the memory, after that for the window
	for {
		changed := u.changed()
		if lag == nil && u.idle() >= u.m.Policy.C {
			t := time.NewTimer(min(graceMax, max(graceMin*5, time.Since(begun))))
			defer t.Stop()
			lag = t.C
		}
		select {
		case window <- struct{}{}:
			if u.p.memory.TryAcquire(n) {
				return u.newChunk(n), nil
			}
			window, memory = nil, make(chan error, 1)
			go func() { memory <- u.p.memory.Acquire(ctx, n) }()
		case err := <-memory: // it ends with ctx, too
			if err != nil {
				<-u.window
				return nil, err
			}
			return u.newChunk(n), nil
		case <-lag:
			u.stopLagging()
			lag = nil
		case <-changed:
		case <-tick.C:
			u.stopDown()
		case <-done(ctx, memory):
			return nil, ctx.Err()
		}
	}
}

// done is closed with ctx, unless what has been asked for ends with it and has to be
// waited for.
func done(ctx context.Context, asked chan error) <-chan struct{} {
	if asked != nil {
		return nil
	}
	return ctx.Done()
}

// newChunk returns a chunk of n bytes, whose memory has been acquired.
func (u *upload) newChunk(n int64) *sharedChunk {
	c := &sharedChunk{u: u, bytes: n}
	c.refs.Store(1)
	c.Chunk, _ = u.p.chunks.Get().(*erasure.Chunk)
	if c.Chunk == nil {
		c.Chunk = new(erasure.Chunk)
	}
	if size := u.m.Layout().EncodedBytes(); size >= slab.MinBytes {
		c.memory = slab.Get(int(size))
		c.Memory = c.memory.B
	}
	return c
}

// release drops n references; the last gives the memory back.
func (c *sharedChunk) release(n int32) {
	if c.refs.Add(-n) > 0 {
		return
	}
	if c.memory != nil {
		c.Memory = nil
		c.memory.Free()
	}
	c.u.p.chunks.Put(c.Chunk)
	c.u.p.memory.Release(c.bytes)
	<-c.u.window
}

// shardWriter sends one shard's fragments to its device, and the shard's manifest when
// all others are durable: with the last fragment if that is the only one left, as in
// a small object, else by itself, so that the last fragment waits for no other.
type shardWriter struct {
	u      *upload
	shard  int
	m      *Member
	queue  chan *sharedChunk
	ctx    context.Context
	cancel context.CancelFunc

	mu     sync.Mutex
	sent   int // chunks handed to it
	stored int // chunks durable
	ended  bool
	over   bool // the goroutine is gone
	failed error
}

// start makes a writer for each shard that has a device.
func (u *upload) start(ctx context.Context) {
	for i, id := range u.m.Shards {
		if id == "" {
			continue
		}
		s := &shardWriter{u: u, shard: i, m: u.p.fleet.Member(id), queue: make(chan *sharedChunk, cap(u.window))}
		s.ctx, s.cancel = context.WithCancel(ctx)
		u.shards = append(u.shards, s)
		go s.run()
	}
}

// hand gives a chunk, whose fragment is ready, to a shard that has not failed.
func (u *upload) hand(c *sharedChunk, shard int) {
	for _, s := range u.shards {
		if s.shard != shard {
			continue
		}
		s.mu.Lock()
		if s.failed == nil {
			c.refs.Add(1)
			s.sent++
			s.queue <- c // never blocks: the window is as large
		}
		s.mu.Unlock()
	}
}

// end says that no more chunks come.
func (s *shardWriter) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.ended = true
		close(s.queue)
	}
}

func (s *shardWriter) run() {
	defer func() {
		s.mu.Lock()
		s.over = true
		s.mu.Unlock()
		s.u.broadcast()
	}()
	if s.m == nil {
		s.fail(fmt.Errorf("device %s was taken out of the registry: %w", s.u.m.Shards[s.shard], asd.ErrUnavailable))
	}
	var sending sync.WaitGroup
	marked := false
	for c := range s.queue {
		if c.Last && s.left() == 1 {
			sending.Wait()
			marked = s.send(c, true)
			continue
		}
		sending.Go(func() { s.send(c, false) })
	}
	sending.Wait()
	if s.err() == nil && !marked && s.ctx.Err() == nil {
		if err := s.apply(s.mark(nil)); err != nil {
			s.fail(err)
		}
	}
	if s.ctx.Err() != nil {
		s.fail(s.ctx.Err())
	}
}

// left is how many chunks that were handed to it are not durable.
func (s *shardWriter) left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent - s.stored
}

// send stores a chunk's fragment, unless the shard has failed, and releases the
// chunk. mark: with the shard's manifest. It says whether the fragment is durable.
func (s *shardWriter) send(c *sharedChunk, mark bool) (ok bool) {
	if s.err() == nil {
		if err := s.store(c, mark); err != nil {
			s.fail(err)
		} else {
			ok = true
			s.mu.Lock()
			s.stored++
			s.mu.Unlock()
		}
	}
	c.release(1)
	s.u.broadcast()
	return ok
}

// store makes a fragment durable, with the shard's manifest if asked.
func (s *shardWriter) store(c *sharedChunk, mark bool) error {
	m := s.u.m
	key := alba.FragmentKey(m.NamespaceID, m.Upload, s.shard, c.Number)
	updates := []asd.Update{asd.Put(key, asd.SealBlocks(c.Shards[s.shard], alba.Unit(m.Compression, m.Encryption)))}
	if mark {
		updates = s.mark(updates)
	}
	return s.apply(updates)
}

// mark adds the shard's manifest: only the end of the stream says how long it is.
func (s *shardWriter) mark(updates []asd.Update) []asd.Update {
	m := s.u.m
	return append(updates, asd.Put(alba.ShardKey(m.NamespaceID, m.Upload, s.shard), asd.NewValue(m.Encode())))
}

// apply writes with the owner's epoch, and tells the device of the namespace's.
func (s *shardWriter) apply(updates []asd.Update) error {
	ctx, cancel := context.WithTimeout(s.ctx, s.u.p.writeTimeout)
	defer cancel()
	if err := s.m.ApplyOwned(ctx, &s.u.ns, s.u.epoch, updates, s.u.pri); err != nil {
		return fmt.Errorf("shard %d on device %s: %w", s.shard, s.m.Record().ID, err)
	}
	return nil
}

func (s *shardWriter) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *shardWriter) fail(err error) {
	s.mu.Lock()
	if s.failed == nil {
		s.failed = err
	}
	s.mu.Unlock()
	s.u.broadcast()
}

// state says whether the shard is durable, and whether it may still become so.
func (s *shardWriter) state() (done, pending bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed == nil && s.over, s.failed == nil && !s.over
}

func (u *upload) count() (done, pending int) {
	for _, s := range u.shards {
		d, p := s.state()
		if d {
			done++
		}
		if p {
			pending++
		}
	}
	return done, pending
}

func (u *upload) pending() int {
	_, n := u.count()
	return n
}

func (u *upload) alive() int {
	done, pending := u.count()
	return done + pending
}

// idle is how many shards have stored all that they were given.
func (u *upload) idle() (n int) {
	for _, s := range u.shards {
		s.mu.Lock()
		if s.failed == nil && s.stored == s.sent {
			n++
		}
		s.mu.Unlock()
	}
	return n
}

// stopLagging gives up the shards that have not, if the others are enough.
func (u *upload) stopLagging() {
	if u.idle() < u.m.Policy.C {
		return
	}
	for _, s := range u.shards {
		s.mu.Lock()
		lags := s.failed == nil && s.stored < s.sent
		if lags {
			s.failed = fmt.Errorf("shard %d: device %s is too slow: %w", s.shard, u.m.Shards[s.shard], context.DeadlineExceeded)
		}
		s.mu.Unlock()
		if lags {
			s.m.hedged(time.Now())
			s.cancel()
		}
	}
	u.broadcast()
}

// stopDown gives up the shards whose devices fail otherwise: one that hangs would
// be waited for much longer.
func (u *upload) stopDown() {
	for _, s := range u.shards {
		if _, pending := s.state(); !pending {
			continue
		}
		if reason, _ := s.m.Down(); reason != "" && !s.m.Up() {
			s.fail(fmt.Errorf("shard %d: device %s is down: %w (%s)", s.shard, u.m.Shards[s.shard], asd.ErrUnavailable, reason))
			s.cancel()
		}
	}
}

// stopLate gives up all shards that are not durable yet.
func (u *upload) stopLate() {
	for _, s := range u.shards {
		if _, pending := s.state(); pending {
			s.cancel()
		}
	}
}

// join ends all writers and waits for them.
func (u *upload) join() {
	for _, s := range u.shards {
		s.cancel()
		s.end()
	}
	for {
		changed := u.changed()
		left := false
		for _, s := range u.shards {
			s.mu.Lock()
			left = left || !s.over
			s.mu.Unlock()
		}
		if !left {
			return
		}
		<-changed
	}
}

// durable is where the shards are that can be read.
func (u *upload) durable() []string {
	list := make([]string, u.m.Policy.Shards())
	for _, s := range u.shards {
		if done, _ := s.state(); done {
			list[s.shard] = s.m.Record().ID
		}
	}
	return list
}

// changed is closed at the next change of a shard's state. Take it before looking.
func (u *upload) changed() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.news == nil {
		u.news = make(chan struct{})
	}
	return u.news
}

func (u *upload) broadcast() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.news != nil {
		close(u.news)
		u.news = nil
	}
}
