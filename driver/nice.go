package driver

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Scheduling policies of sched(7).
const (
	schedNormal = 0
	schedIdle   = 5
)

// niceness lowers and raises the priority of the calling thread, where the
// process may raise it again. A thread that writes the log out while nobody waits
// for it runs when nothing else wants its CPU: where workers share that CPU,
// guests come first.
type niceness struct{ usable bool }

// probe finds out, on a thread that it gives up, whether raising works.
func (n *niceness) probe() {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- setPolicy(schedIdle) == nil && setPolicy(schedNormal) == nil
	}()
	n.usable = <-done
}

// set gives the calling thread, to which the goroutine is locked, background or
// normal priority. It is an optimisation: an error changes nothing else.
func (n *niceness) set(background bool) {
	switch {
	case !n.usable:
	case background:
		_ = setPolicy(schedIdle)
	default:
		_ = setPolicy(schedNormal)
	}
}

func setPolicy(policy uint32) error {
	return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: policy}, 0)
}
