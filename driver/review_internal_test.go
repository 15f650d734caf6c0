package driver

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"
)

// HoldCheck keeps SCOs from being deleted, as a check does, until release.
func (v *Volume) HoldCheck() (release func()) {
	v.checkMu.RLock()
	return v.checkMu.RUnlock
}

// NoTicks keeps the engine from housekeeping until goOn.
func (v *Volume) NoTicks() (goOn func()) {
	for !v.scrubbing.CompareAndSwap(false, true) {
		time.Sleep(time.Millisecond)
	}
	return func() { v.scrubbing.Store(false) }
}

// GrowLog makes the log look as if so many records had been closed since the last
// checkpoint.
func (v *Volume) GrowLog(records int64) { v.logSince.Add(records) }

// CheckpointMax is from how many records on a checkpoint is written in any case.
const CheckpointMax = checkpointMax

// Closing reports whether Close lets nobody in any more.
func (v *Volume) Closing() bool {
	v.users.mu.Lock()
	defer v.users.mu.Unlock()
	return v.users.closed
}

// Resting reports whether the volume's next tick does nothing.
func (v *Volume) Resting() bool { return v.resting() }

// DeadBytes is what SCOs occupy that nothing refers to.
func (v *Volume) DeadBytes() (n uint64) {
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	for _, m := range v.scos {
		if v.live.at(m.number).Load() == 0 {
			n += uint64(m.size)
		}
	}
	return n
}

// DuplicateInTable returns a SCO that a checkpoint begun now would name twice, 0
// if there is none.
func (v *Volume) DuplicateInTable() uint64 {
	v.gate.Lock()
	entries, _ := v.table(v.cur.hdr.Number, noPins, v.live.copy())
	v.gate.Unlock()
	seen := map[uint64]bool{}
	for _, e := range entries {
		if seen[e.number] {
			return e.number
		}
		seen[e.number] = true
	}
	return 0
}

// Sealed is a SCO as whoever found it before it was sealed still knows it.
type Sealed struct{ l *logSCO }

// Head returns the SCO that is written now.
func (v *Volume) Head() Sealed {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return Sealed{v.cur}
}

// IsSealed reports whether it is by now.
func (s Sealed) IsSealed() bool { return s.l.sealed.Load() }

// Records looks at every record that the SCO ever had, as a check does that began
// before it was sealed, and returns how many it finds.
func (s Sealed) Records() (found int) {
	records, _ := unpack(s.l.head.Load())
	for i := range records {
		if _, ok := s.l.peek(i); ok {
			found++
		}
	}
	return found
}

// Checksums is how many checksums of its clusters are in RAM.
func (s Sealed) Checksums() (n int) {
	for i := range s.l.crcs {
		if s.l.crcs[i].Load() != nil {
			n += chunkClusters
		}
	}
	return n
}

// InRAM reports whether readers still find it in the table of SCOs in RAM.
func (s Sealed) InRAM() bool { return s.l.vol.ramSCO(s.l.hdr.Number) == s.l }

// TestConditionsFlap: a condition that comes and goes every millisecond for two
// minutes is listed all the time and logged a few times only; afterwards it goes.
func TestConditionsFlap(t *testing.T) {
	var c conditions
	now := time.Unix(1000, 0)
	begun, ended := 0, 0
	for i := range 120_000 {
		now = now.Add(time.Millisecond)
		if c.set(now, "throttled", fmt.Sprint(i)) {
			begun++
		}
		c.unset(now, "throttled")
		if i%1000 == 0 {
			ended += len(c.sweep(now))
		}
		if l := c.list(now); i == 0 && len(l) != 0 {
			t.Fatalf("listed although it has ended and not come back: %v", l)
		} else if i > 0 && (len(l) != 1 || l[0].Code != "throttled") {
			t.Fatalf("after %d ms it is not listed: %v", i, l)
		}
	}
	if begun != 1 || ended != 0 {
		t.Errorf("%d beginnings and %d ends are logged of one that goes on", begun, ended)
	}
	now = now.Add(conditionLinger)
	if l := c.list(now); len(l) != 0 {
		t.Errorf("still listed: %v", l)
	}
	if got := c.sweep(now); len(got) != 1 {
		t.Errorf("its end is not logged: %v", got)
	}
	// With longer pauses it begins and ends each time, and the log has few of them.
	begun, ended = 0, 0
	for range 100 {
		now = now.Add(conditionLinger + time.Second)
		ended += len(c.sweep(now))
		if c.set(now, "throttled", "again") {
			begun++
		}
		c.unset(now, "throttled")
	}
	if begun < 10 || begun > 21 || ended > begun {
		t.Errorf("%d beginnings and %d ends are logged in 10 minutes", begun, ended)
	}
	// One that holds on is logged although it began in the quiet time.
	c.sweep(now.Add(conditionLinger))
	now = now.Add(conditionLinger)
	logged := false
	for range 31 {
		now = now.Add(time.Second)
		logged = c.set(now, "throttled", "holds") || logged
	}
	if !logged {
		t.Error("a condition that holds on was never logged")
	}
}

// TestUsers: shut waits for those who are inside and lets nobody in.
func TestUsers(t *testing.T) {
	var u users
	for range 2 {
		if !u.add() {
			t.Fatal("not let in")
		}
	}
	shut := make(chan struct{})
	go func() {
		u.shut()
		close(shut)
	}()
	u.done()
	for u.add() { // until shut has begun
		u.done()
		time.Sleep(time.Millisecond)
	}
	select {
	case <-shut:
		t.Fatal("shut while one is inside")
	default:
	}
	u.done()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	select {
	case <-shut:
	case <-ctx.Done():
		t.Fatal("not shut although nobody is inside")
	}
}

// LookAtSnapshot does what the last look at a SCO does with a snapshot, until done.
func (v *Volume) LookAtSnapshot(ctx context.Context, id uuid.UUID) (done func(), err error) {
	_, done, err = v.lookAtSnapshot(ctx, id)
	return done, err
}
