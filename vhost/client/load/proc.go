package load

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Usage is what a process has used so far.
type Usage struct {
	CPU time.Duration // user and system, all threads
	RSS int64         // bytes resident now, shared memory included
	// Anon is the part of RSS that is the process's own: neither files nor
	// shared memory, which the front end's memory and a tmpfs disk are.
	Anon int64
}

// clockTick is the unit of the times in /proc/PID/stat (USER_HZ), which is 100
// on every Linux architecture that Go knows.
const clockTick = 10 * time.Millisecond

// ReadUsage reads /proc/PID/stat and /proc/PID/status.
func ReadUsage(pid int) (Usage, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Usage{}, err
	}
	// The second field, the name in parentheses, may contain anything.
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	const utime, stime = 14 - 3, 15 - 3 // counted from the third field
	if len(f) <= stime {
		return Usage{}, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	var u Usage
	for _, i := range []int{utime, stime} {
		ticks, err := strconv.ParseInt(string(f[i]), 10, 64)
		if err != nil {
			return Usage{}, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		u.CPU += time.Duration(ticks) * clockTick
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return Usage{}, err
	}
	u.RSS = statusKB(status, "VmRSS:")
	u.Anon = statusKB(status, "RssAnon:")
	return u, nil
}

// statusKB returns the field in bytes, 0 if it is missing (a kernel thread).
func statusKB(status []byte, key string) int64 {
	for line := range bytes.Lines(status) {
		f := bytes.Fields(line)
		if len(f) >= 2 && string(f[0]) == key {
			kb, err := strconv.ParseInt(string(f[1]), 10, 64)
			if err != nil {
				return 0
			}
			return kb << 10
		}
	}
	return 0
}

// PinThread binds the calling OS thread, which the goroutine must have locked,
// to one CPU.
func PinThread(cpu int) error { return pin(0, cpu) }

// runInBackground gives the calling OS thread, which the goroutine must have
// locked for good, the lowest priority there is.
func runInBackground() error {
	const schedIdle = 5
	return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: schedIdle}, 0)
}

// PinProcess binds every present thread of process pid to one CPU; threads that
// these start inherit it. It goes over the threads until it finds no new one.
func PinProcess(pid, cpu int) error {
	seen := map[int]bool{}
	for {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		fresh := false
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || seen[tid] {
				continue
			}
			seen[tid], fresh = true, true
			if err := pin(tid, cpu); err != nil && err != unix.ESRCH {
				return fmt.Errorf("pin thread %d of process %d to CPU %d: %w", tid, pid, cpu, err)
			}
		}
		if !fresh {
			return nil
		}
	}
}

func pin(tid, cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	return unix.SchedSetaffinity(tid, &set)
}
