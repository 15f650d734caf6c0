package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"scoria/alba/vfs"
	"scoria/driver"
)

const (
	instanceFile    = "instance.json"
	instanceVersion = 1
	shmDir          = "/dev/shm"

	registryFile = "registry.db"
)

// instance is DATA/instance.json: who this daemon is, and how its last run
// began and ended. From that the next start knows whether the write buffer must
// be there.
type instance struct {
	Version  int    `json:"version"`
	ID       string `json:"id"`        // node ID, for good
	BootID   string `json:"boot_id"`   // of the host when the last run began
	Clean    bool   `json:"clean"`     // the last run closed every volume
	PoolFile string `json:"pool_file"` // of the last run
}

// lockDir takes DIR/lock, making the directory if need be; what is the setting's
// name. It fails with who holds it; a holder that is already dying (killed, its
// memory being torn down) is waited for.
func lockDir(ctx context.Context, fsys vfs.FS, what, dir string) (io.Closer, error) {
	const pause, attempts = 5 * time.Millisecond, 2000
	if err := fsys.MkdirAll(dir); err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, dir, err)
	}
	name := filepath.Join(dir, "lock")
	for i := 0; ; i++ {
		l, err := fsys.Lock(name)
		switch {
		case err == nil:
			return l, nil
		case !errors.Is(err, vfs.ErrLocked):
			return nil, fmt.Errorf("%s %s: %w", what, dir, err)
		case i == attempts || !holderIsDying(fsys, name):
			return nil, fmt.Errorf("%s %s: another scoriad uses it: %w; stop that one or name another directory", what, dir, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// holderIsDying says whether the process whose pid is in a lock file is on its
// way out and will let go of the lock by itself.
func holderIsDying(fsys vfs.FS, name string) bool {
	b, err := readFile(fsys, name)
	if err != nil {
		return false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || err == nil && dying(string(status))
}

// dying reads /proc/PID/status: a process that has no memory any more, is a
// zombie, or has a SIGKILL waiting.
func dying(status string) bool {
	hasMemory := false
	for line := range strings.Lines(status) {
		field, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch field {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "VmSize":
			hasMemory = true
		case "SigPnd", "ShdPnd":
			if mask, err := strconv.ParseUint(value, 16, 64); err == nil && mask&(1<<(unix.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return !hasMemory
}

// loadInstance reads DIR/instance.json; a new identity if there is none.
func loadInstance(fsys vfs.FS, dir string) (instance, error) {
	name := filepath.Join(dir, instanceFile)
	b, err := readFile(fsys, name)
	if errors.Is(err, fs.ErrNotExist) {
		return instance{Version: instanceVersion, ID: uuid.NewString(), Clean: true}, nil
	}
	var in instance
	if err == nil {
		err = json.Unmarshal(b, &in)
	}
	switch {
	case err != nil:
		return in, fmt.Errorf("%s: %w", name, err)
	case in.Version != instanceVersion:
		return in, fmt.Errorf("%s: version %d, this program knows %d", name, in.Version, instanceVersion)
	case uuid.Validate(in.ID) != nil:
		return in, fmt.Errorf("%s: id %q: must be a UUID", name, in.ID)
	}
	return in, nil
}

// save writes the file, durably and all or nothing.
func (in instance) save(fsys vfs.FS, dir string) error {
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	name := filepath.Join(dir, instanceFile)
	if err := writeFile(fsys, name, append(b, '\n')); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// poolPlan says where the write buffer lies.
type poolPlan struct {
	file string
	// needed: the last run died and the host did not restart, so the file has
	// completed writes that are nowhere else.
	needed bool
	// obsolete is a file of the last run that nothing needs any more, or empty.
	obsolete string
}

// planPool decides where the write buffer is. A run that died on this boot left
// its volumes' heads in the file that instance.json names: that one must be used,
// whatever the configuration says now.
func planPool(in instance, bootID, configured string) poolPlan {
	switch {
	case in.PoolFile == "":
		return poolPlan{file: configured}
	case !in.Clean && in.BootID == bootID:
		return poolPlan{file: in.PoolFile, needed: true}
	case in.PoolFile != configured:
		return poolPlan{file: configured, obsolete: in.PoolFile}
	}
	return poolPlan{file: configured}
}

// lostCondition is what it means that a needed write buffer was not there.
func lostCondition(name string) driver.Condition {
	return driver.Condition{Code: "write-buffer-lost", Message: fmt.Sprintf(
		"the write buffer %s was gone or unusable although the last scoriad died and the host did not restart: writes that had completed but were not flushed are lost, "+
			"which breaks promise P3 (the daemon may die) for guests that ran on; flushed writes (P1) are safe. "+
			"Check those guests' file systems, and find out what removed the file (RuntimeDirectory= without RuntimeDirectoryPreserve=, a cleaner of temporary files)", name)}
}

// poolDir returns the directory of the write buffer: the configured one, else
// RUN if it is on tmpfs and has room, else /dev/shm.
func poolDir(c *Config, fsys vfs.FS, size int64) (dir, why string) {
	if c.WriteBuffer.Dir != "" {
		return c.WriteBuffer.Dir, "configured"
	}
	if !onTmpfs(c.RunDir) {
		return shmDir, "run_dir is not on tmpfs"
	}
	// Room besides for the sockets and others' files.
	if free, err := fsys.Free(c.RunDir); err == nil && int64(free) < size+size/8 {
		return shmDir, fmt.Sprintf("run_dir has %s free, too little", Size(free&^0xfffff))
	}
	return c.RunDir, "run_dir is on tmpfs"
}

func onTmpfs(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// poolFileName is unique per instance: several may share /dev/shm.
func poolFileName(dir, id string) string {
	return filepath.Join(dir, "scoria-"+strings.SplitN(id, "-", 2)[0]+".pool")
}

// defaultWriteBuffer is a sixteenth of the RAM within its limits.
func defaultWriteBuffer() int64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return minWriteBuffer
	}
	ram := int64(si.Totalram) * int64(si.Unit)
	return min(max(ram/16&^(1<<20-1), minWriteBuffer), maxWriteBuffer)
}

func readBootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func readFile(fsys vfs.FS, name string) ([]byte, error) {
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	const limit = 1 << 20
	if size > limit {
		return nil, fmt.Errorf("has %d bytes, at most %d are expected", size, limit)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b, nil
}

// writeFile replaces a file durably: after a crash it has the old or the new
// contents.
func writeFile(fsys vfs.FS, name string, b []byte) (err error) {
	tmp := name + ".tmp"
	f, err := fsys.Open(tmp, vfs.Create)
	if err != nil {
		return err
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return err
	}
	return fsys.SyncDir(filepath.Dir(name))
}
