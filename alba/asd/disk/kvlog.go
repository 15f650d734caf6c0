package disk

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// kvLogger is what Pebble logs to. Pebble calls Fatalf when it can't know any
// more what its log or its manifest holds on the disk, and expects not to
// return; the process may serve other disks, so this one fails and the
// goroutine that found out stays where it is, with the locks it holds. Reads
// need none of those.
type kvLogger struct{ d *Disk }

// Infof implements pebble's Logger. Pebble tells every flush and compaction.
func (l kvLogger) Infof(format string, args ...any) {
	if e := l.d.log.Trace(); e.Enabled() {
		e.Msg(strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
}

// Errorf implements pebble's Logger.
func (l kvLogger) Errorf(format string, args ...any) {
	l.d.log.Warn().Msg(strings.TrimSpace(fmt.Sprintf(format, args...)))
}

// Fatalf implements pebble's Logger.
func (l kvLogger) Fatalf(format string, args ...any) {
	l.d.halt(fmt.Errorf(format, args...))
}

// halt fails the disk and keeps the goroutine, which is one of Pebble's.
func (d *Disk) halt(err error) {
	d.fail(fmt.Errorf("key-value store: %w", err))
	d.stuckOnce.Do(func() { close(d.stuck) })
	select {}
}

// backgroundPause is between two attempts of Pebble's at background work that fails. It
// makes none itself and would keep a CPU busy for as long as a disk is full, say. It
// holds a lock meanwhile that reads and most writes do without.
const backgroundPause = 20 * time.Millisecond

func (d *Disk) kvEvents() *pebble.EventListener {
	return &pebble.EventListener{
		BackgroundError: func(err error) {
			if pebble.IsCorruptionError(err) {
				d.setDamaged(err.Error())
			} else if d.access.phase.Load() != phaseOpen { // which would last for as long as the disk fails
				d.halt(kvError(err))
			}
			d.log.Warn().Err(err).Msg("key-value store: background work failed and is tried again")
			time.Sleep(backgroundPause)
		},
		FlushEnd: func(info pebble.FlushInfo) {
			if info.Err == nil {
				d.access.phase.CompareAndSwap(phaseOpening, phaseCarried)
			}
		},
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			d.n.corruptBlocks.Add(1)
			d.setDamaged(fmt.Sprintf("%s: %v", info.Path, info.Details))
		},
	}
}

// kvError gives errors of Pebble, which print their stack, a plain form.
func kvError(err error) error {
	if err == nil {
		return nil
	}
	return &storeError{err}
}

type storeError struct{ err error }

func (e *storeError) Error() string { return e.err.Error() }
func (e *storeError) Unwrap() error { return errors.Unwrap(e.err) }
