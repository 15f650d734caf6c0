package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver/control"
	"scoria/shm"
	"scoria/shm/worker"
)

// ShmConfig is section [shm].
type ShmConfig struct {
	Enabled     bool        `toml:"enabled" comment:"Serve all volumes to programs on this host over shared memory, on run_dir/shm.sock."`
	Memory      Size        `toml:"memory" comment:"Memory that the rings of all programs may take together; one user but root may have half of it."`
	Connections int         `toml:"connections" comment:"Connections at once; one user but root may have half of them."`
	Access      []ShmAccess `toml:"access" comment:"Who may use which volumes; the first entry whose volume matches decides. Volumes that\nnone matches are root's, the daemon's user's and sockets.group's. Each entry has volume =\n\"POOL/PATTERN\", users = [\"…\"], groups = [\"…\"] and create = true or false."`
}

// ShmAccess is an entry of shm.access.
type ShmAccess struct {
	Volume string   `toml:"volume"` // pattern of path.Match
	Users  []string `toml:"users"`  // names or numbers
	Groups []string `toml:"groups"`
	Create bool     `toml:"create"` // volumes of such names, too
}

const (
	maxShmConnections = 1 << 16
	minShmMemory      = 16 << 20
)

func (c *ShmConfig) validate() error {
	switch {
	case c.Memory < minShmMemory || c.Memory > 1<<40:
		return fmt.Errorf("shm.memory %s: must be from %s to 1TiB", c.Memory, Size(minShmMemory))
	case c.Connections < 1 || c.Connections > maxShmConnections:
		return fmt.Errorf("shm.connections %d: must be from 1 to %d", c.Connections, maxShmConnections)
	}
	_, err := c.rules()
	return err
}

// shmRule is an entry of shm.access with its names looked up.
type shmRule struct {
	pattern       string
	users, groups []uint32
	create        bool
}

func (c *ShmConfig) rules() ([]shmRule, error) {
	rules := make([]shmRule, len(c.Access))
	for i, a := range c.Access {
		if _, err := path.Match(a.Volume, ""); err != nil || a.Volume == "" {
			return nil, fmt.Errorf("shm.access %d: volume %q: must be POOL/VOLUME, where * and ? stand for other characters", i+1, a.Volume)
		}
		r := shmRule{pattern: a.Volume, create: a.Create}
		for _, name := range a.Users {
			id, err := lookUp(name, func() (string, error) {
				u, err := user.Lookup(name)
				if err != nil {
					return "", err
				}
				return u.Uid, nil
			})
			if err != nil {
				return nil, fmt.Errorf("shm.access %d: user %q: must be a user's name or number", i+1, name)
			}
			r.users = append(r.users, id)
		}
		for _, name := range a.Groups {
			id, err := lookUp(name, func() (string, error) {
				g, err := user.LookupGroup(name)
				if err != nil {
					return "", err
				}
				return g.Gid, nil
			})
			if err != nil {
				return nil, fmt.Errorf("shm.access %d: group %q: must be a group's name or number", i+1, name)
			}
			r.groups = append(r.groups, id)
		}
		rules[i] = r
	}
	return rules, nil
}

// lookUp returns the number that name is, or that find gives.
func lookUp(name string, find func() (string, error)) (uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), nil
	}
	s, err := find()
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}

// shmAccess decides by credentials who may use what.
type shmAccess struct {
	rules []shmRule
	group int // of volumes without a rule; -1: none
	owner uint32
}

func (a *shmAccess) allow(who shm.Peer, what shm.Action, volume string) error {
	if who.UID == 0 || who.UID == a.owner {
		return nil
	}
	for i := range a.rules {
		r := &a.rules[i]
		if ok, err := path.Match(r.pattern, volume); err != nil || !ok {
			continue
		}
		if what == shm.ActionCreate && !r.create {
			return fmt.Errorf("volume %s: shm.access does not let others than root make it: %w", volume, shm.ErrDenied)
		}
		if slices.Contains(r.users, who.UID) || slices.ContainsFunc(r.groups, who.In) {
			return nil
		}
		return fmt.Errorf("volume %s: shm.access does not name user %d or a group of theirs: %w", volume, who.UID, shm.ErrDenied)
	}
	if a.group >= 0 && who.In(uint32(a.group)) {
		return nil
	}
	return fmt.Errorf("volume %s: user %d is neither root nor in sockets.group, and shm.access says nothing: %w", volume, who.UID, shm.ErrDenied)
}

// shmFront serves all volumes on one socket.
type shmFront struct {
	server *shm.Server
	socket string
	done   chan error
}

func newShmFront(c *Config, socks *sockets, workers *worker.Set, volumes *VolumeSet, log zerolog.Logger) (*shmFront, error) {
	rules, err := c.Shm.rules()
	if err != nil {
		return nil, err
	}
	access := &shmAccess{rules: rules, group: socks.gid, owner: uint32(os.Geteuid())}
	mode := socks.mode
	if len(rules) > 0 {
		mode = fs.FileMode(0o666) // who may do what is for the rules to say
	}
	l, err := socks.listenAs("unixpacket", c.shmSocket(), mode)
	if err != nil {
		return nil, err
	}
	f := &shmFront{
		server: shm.NewServer(shm.Config{
			Opener: volumes, Set: workers, FullName: fullName, Allow: access.allow,
			Snapshot: func(ctx context.Context, volume, snapshot string) error {
				_, _, err := volumes.createSnapshot(ctx, volume, uuid.New(), control.CreateSnapshot{Name: snapshot})
				return err
			},
			MaxConnections: c.Shm.Connections, MemoryBytes: int64(c.Shm.Memory), Log: log.With().Str("front_end", "shm").Logger(),
		}),
		socket: c.shmSocket(), done: make(chan error, 1),
	}
	go func(l *net.UnixListener) { f.done <- f.server.Serve(l) }(l)
	return f, nil
}

func (f *shmFront) Add(string) error { return nil }

func (f *shmFront) Remove(name string) { f.server.Remove(name) }

func (f *shmFront) Users(name string) []string {
	st, ok := f.server.VolumeStats(name)
	if !ok || st.Sessions == 0 {
		return nil
	}
	return []string{fmt.Sprintf("shm (%d connections, %d rings)", st.Sessions, st.Rings)}
}

func (f *shmFront) LastDisconnect(name string) (reason string, when time.Time) {
	st, _ := f.server.VolumeStats(name)
	return st.LastDisconnect, st.LastDisconnectTime
}

// Close ends the sessions. Requests that wait for room are left to be submitted
// again to the next daemon.
func (f *shmFront) Close(ctx context.Context) error {
	err := within(ctx, "shm front end", f.server.Close)
	if err == nil {
		if served := <-f.done; !errors.Is(served, shm.ErrServerClosed) {
			err = served
		}
	}
	return errors.Join(err, os.Remove(f.socket))
}
