package disk

import (
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

// compactions lets Pebble compact, one at a time, but not before it is open. When an
// opening fails, Pebble gives up what it has without waiting for a compaction that a flush
// of the log has begun meanwhile, and that one, or whoever closes the tables under it, may
// panic: a disk that fails must not take the process with it. Pebble's own scheduler
// would also go on asking what has failed to open, every 100 ms, for good.
//
// Its mutex comes after those of Pebble, which is not called with it.
type compactions struct {
	mu      sync.Mutex
	granted *sync.Cond // granting has ended
	db      pebble.DBForCompaction

	open     bool
	running  bool // a compaction
	granting bool // a goroutine asks the DB, without the mutex
	waits    bool // the DB may wait for one, and asks for none until it is given it
}

var (
	_ pebble.CompactionScheduler   = (*compactions)(nil)
	_ pebble.CompactionGrantHandle = (*compactions)(nil)
)

func newCompactions() *compactions {
	s := new(compactions)
	s.granted = sync.NewCond(&s.mu)
	return s
}

// opened says that the DB is open. Called once, without locks of the DB.
func (s *compactions) opened() {
	s.mu.Lock()
	s.open = true
	s.mu.Unlock()
	s.grant()
}

// Register implements pebble.CompactionScheduler.
func (s *compactions) Register(_ int, db pebble.DBForCompaction) { s.db = db }

// Unregister implements pebble.CompactionScheduler: the DB is not called afterwards.
func (s *compactions) Unregister() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = false
	for s.granting {
		s.granted.Wait()
	}
}

// TrySchedule implements pebble.CompactionScheduler.
func (s *compactions) TrySchedule() (bool, pebble.CompactionGrantHandle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.open || s.running {
		s.waits = true
		return false, nil
	}
	s.running = true
	return true, s
}

// UpdateGetAllowedWithoutPermission implements pebble.CompactionScheduler. How many it
// would like does not matter.
func (s *compactions) UpdateGetAllowedWithoutPermission() {}

// grant gives the DB what it waits for.
func (s *compactions) grant() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.granting {
		return // that goroutine looks again
	}
	s.granting = true
	for s.waits && s.open && !s.running {
		s.waits, s.running = false, true
		s.mu.Unlock()
		waiting, _ := s.db.GetWaitingCompaction()
		took := waiting && s.db.Schedule(s)
		s.mu.Lock()
		if took { // it may have ended by now
			s.waits = true // for another one, without a word
		} else {
			s.running = false
		}
	}
	s.granting = false
	s.granted.Broadcast()
}

// Started implements pebble.CompactionGrantHandle.
func (s *compactions) Started() {}

// MeasureCPU implements pebble.CompactionGrantHandle.
func (s *compactions) MeasureCPU(pebble.CompactionGoroutineKind) {}

// CumulativeStats implements pebble.CompactionGrantHandle.
func (s *compactions) CumulativeStats(pebble.CompactionGrantHandleStats) {}

// Done implements pebble.CompactionGrantHandle.
func (s *compactions) Done() {
	s.mu.Lock()
	s.running = false
	s.mu.Unlock()
	s.grant()
}
