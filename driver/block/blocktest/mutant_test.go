package blocktest_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/driver/block"
	"scoria/driver/block/blocktest"
)

// mutant is a device with one fault.
type mutant struct {
	*blocktest.RAM
	fault string

	mu     sync.Mutex
	owners map[any]bool // of requests seen
}

// mutants are the faults that the suite has to find: by which subtest, and what
// it says then.
var mutants = map[string]struct{ test, says string }{
	"drops a byte":            {"ReadBack", "byte 4095 is 0x00"},
	"widens a discard":        {"Discard", "byte 9216 is 0x00"},
	"forgets half a discard":  {"DiscardFUA", "want 0x00"},
	"ignores write-zeroes":    {"WriteZeroes", "byte 0 is"},
	"accepts any range":       {"Range", "want ErrRange"},
	"refuses empty requests":  {"ZeroLength", "of no bytes"},
	"completes twice":         {"ReadBack", "Complete was called twice"},
	"completes inside Submit": {"CompletesOnceAndOutsideSubmit", "Complete was called from within Submit"},
	"never ends":              {"FlushAndFUA", "did not end within"},
	"tears writes":            {"ConcurrentOverlapping", "torn"},
	"reads old data at times": {"ConcurrentOverlapping", "had been replaced"},
	"everybody may claim":     {"Claim", "want InUseError"},
	"calls holes mapped":      {"BlockStatus", "a fresh device has"},
	"calls data unmapped":     {"BlockStatus", "0 bytes are mapped"},
	"cancels everybody":       {"Cancel", "request canceled"},
	"tells watchers nothing":  {"Watch", "the watcher was not called"},
}

func (m *mutant) Submit(batch []*block.Request) {
	for _, r := range batch {
		if m.fault == "cancels everybody" {
			m.mu.Lock()
			m.owners[r.Owner] = true
			m.mu.Unlock()
		}
		m.submit(r)
	}
}

func (m *mutant) pass(r *block.Request) { m.RAM.Submit([]*block.Request{r}) }

// part carries out op for a part of r.
func (m *mutant) part(op block.Op, off, length uint64, segs ...[]byte) {
	m.pass(&block.Request{Op: op, Offset: off, Length: length, Segments: segs, Complete: func(*block.Request) {}})
}

func (m *mutant) submit(r *block.Request) {
	answer := func(err error) { r.Err, r.Ended = err, true }
	valid := func() bool { i := m.Info(); return block.CheckRange(&i, r) == nil && r.Length > 0 }()
	switch {
	case m.fault == "drops a byte" && r.Op == block.OpRead && r.Length == 4096:
		m.pass(r)
		if r.Err == nil {
			r.Segments[0][len(r.Segments[0])-1] = 0
		}
	case m.fault == "widens a discard" && r.Op == block.OpDiscard && valid && r.Length%4096 != 0:
		end := (r.Offset + r.Length + 4095) &^ 4095
		m.part(r.Op, r.Offset, end-r.Offset)
		answer(nil)
	case m.fault == "forgets half a discard" && r.Op == block.OpDiscard && valid && r.Flags&block.FUA != 0:
		m.part(r.Op, r.Offset&^4095, r.Length&^4095)
		answer(nil)
	case m.fault == "ignores write-zeroes" && r.Op == block.OpWriteZeroes && valid:
		answer(nil)
	case m.fault == "accepts any range" && r.Op == block.OpRead && r.Offset >= m.Info().Size:
		answer(nil)
	case m.fault == "refuses empty requests" && r.Length == 0 && r.Op != block.OpFlush:
		answer(block.ErrRange)
	case m.fault == "completes twice" && r.Op == block.OpWrite:
		go func() {
			m.pass(r)
			r.Complete(r)
			r.Complete(r)
		}()
	case m.fault == "completes inside Submit" && r.Op == block.OpFlush:
		r.Err = nil
		r.Complete(r)
	case m.fault == "never ends" && r.Op == block.OpFlush:
	case m.fault == "tears writes" && r.Op == block.OpWrite && valid && r.Offset < 6*4096:
		data := bytes.Join(r.Segments, nil)
		for i := 0; i < len(data); i += 512 {
			// Half a block, then the whole one: a reader may come between.
			old := make([]byte, 512)
			m.part(block.OpRead, r.Offset+uint64(i), 512, old)
			copy(old, data[i:i+256])
			m.part(block.OpWrite, r.Offset+uint64(i), 512, old)
			runtime.Gosched()
			m.part(block.OpWrite, r.Offset+uint64(i), 512, data[i:i+512])
		}
		answer(nil)
	case m.fault == "reads old data at times" && r.Op == block.OpRead && valid && m.Submitted()%5 == 0 && m.Submitted() > 100:
		for _, s := range r.Segments {
			clear(s)
		}
		answer(nil)
	default:
		m.pass(r)
	}
}

func (m *mutant) Claim(c block.Claimant) (func(), error) {
	if m.fault == "everybody may claim" {
		return func() {}, nil
	}
	return m.RAM.Claim(c)
}

func (m *mutant) BlockStatus(ctx context.Context, off, length uint64, fn func(block.Extent) bool) error {
	return m.RAM.BlockStatus(ctx, off, length, func(e block.Extent) bool {
		if m.fault == "calls holes mapped" {
			e.Mapped = true
		} else if m.fault == "calls data unmapped" {
			e.Mapped = false
		}
		return fn(e)
	})
}

func (m *mutant) Cancel(owner any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for o := range m.owners {
		m.RAM.Cancel(o)
	}
	m.RAM.Cancel(owner)
}

func (m *mutant) Watch(fn func(block.Info)) func() {
	if m.fault == "tells watchers nothing" {
		fn = func(block.Info) {}
	}
	return m.RAM.Watch(fn)
}

// TestSuiteFindsFaults runs the suite, in a process of its own, against devices
// with one fault each.
func TestSuiteFindsFaults(t *testing.T) {
	if fault := os.Getenv("BLOCKTEST_MUTANT"); fault != "" {
		switch fault {
		case "never ends", "tells watchers nothing": // what is waited for never comes
			blocktest.SetPatience(2 * time.Second)
		}
		blocktest.Run(t, func(t *testing.T) block.Device {
			d := blocktest.NewRAM(blocktest.MinSize, blocktest.Options{})
			t.Cleanup(d.Close)
			return &mutant{RAM: d, fault: fault, owners: make(map[any]bool)}
		})
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for fault, want := range mutants {
		t.Run(strings.ReplaceAll(fault, " ", "_"), func(t *testing.T) {
			cmd := exec.Command(self, "-test.run=^TestSuiteFindsFaults$/^"+want.test+"$")
			cmd.Env = append(os.Environ(), "BLOCKTEST_MUTANT="+fault)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || !strings.Contains(string(out), want.says) {
				t.Errorf("the suite does not find that the device %s (%v)\n%s", fault, err, out)
			}
		})
	}
}
