package driver

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// backgroundNice is the nice value of a thread that writes the log out while
// nobody waits for it. Where workers share CPUs with it, guests come first.
const backgroundNice = 15

// niceness lowers and raises the priority of the calling thread, where the
// process may raise it again.
type niceness struct{ usable bool }

// probe finds out, on a thread that it gives up, whether raising works.
func (n *niceness) probe() {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ok := unix.Setpriority(unix.PRIO_PROCESS, 0, backgroundNice) == nil &&
			unix.Setpriority(unix.PRIO_PROCESS, 0, 0) == nil
		done <- ok
	}()
	n.usable = <-done
}

// set gives the calling thread, to which the goroutine is locked, background or
// normal priority. It is an optimisation: an error changes nothing else.
func (n *niceness) set(background bool) {
	if !n.usable {
		return
	}
	nice := 0
	if background {
		nice = backgroundNice
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, nice)
}
