package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba"
	"scoria/alba/repair"
	"scoria/alba/vfs"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// RebuildRequest says from what a registry is rebuilt.
type RebuildRequest struct {
	// ASDs are the addresses of all storage daemons, directories or HOST:PORT; none: the
	// one that the daemon makes in its data directory.
	ASDs []string
	// Force replaces a registry that has volumes and is not older than what the storage
	// daemons were told, or that can't be read, and accepts that objects are lost, storage daemons missing, and volumes left out whose master key is.
	Force bool
	// Progress is told what is done; may be nil.
	Progress func(text string)
}

// RebuildReport is what a rebuilt registry has and what was not found.
type RebuildReport struct {
	ASDs       int             `json:"asds"`
	Presets    int             `json:"presets"`
	Objects    int             `json:"objects"`
	Pools      []string        `json:"pools"`
	Volumes    []RebuiltVolume `json:"volumes"`
	Missing    []string        `json:"missing_asds"` // IDs of storage daemons that have parts of objects and were not read
	Lost       []string        `json:"lost"`         // objects of which too few parts were found
	Superseded []string        `json:"superseded"`   // objects of which a later upload was taken
	Problems   []string        `json:"problems"`
	Previous   string          `json:"previous"` // where the registry is that was there before; empty: none was
}

// RebuiltVolume is a volume of a rebuilt registry.
type RebuiltVolume struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	Size uint64 `json:"size"`
	Note string `json:"note"` // what is not as it was, if known
}

// RebuildRegistry makes DATA/registry.db from what the storage daemons have (P10), with
// the daemon stopped, whose lock it holds meanwhile. It may be repeated: the registry
// is made under another name and takes its place at the end, whole and durable. On the
// storage daemons only the epochs of the volumes are raised, so that an owner of
// before can't write any more.
//
// Restored are presets, objects, volumes with their names, limits, schedules and what
// they are clones of, and the pools that have volumes. Snapshots are found when the
// volumes are opened, which the next start does. Volumes in the directory store and
// snapshots' later names are not restored, but for those that a registry has that was put
// back from a backup and is older than the storage daemons. Errors that are the operator's have a
// control.Code.
func RebuildRegistry(ctx context.Context, c Config, req RebuildRequest, log zerolog.Logger) (RebuildReport, error) {
	return RebuildRegistryOn(ctx, vfs.OS(), filepath.Join(c.DataDir, registryFile), c, req, log)
}

// RebuildRegistryOn is RebuildRegistry for a daemon that stands on another file system (Parts.FS)
// and has its registry in a file elsewhere (Parts.OpenRegistry), which is always the host's own.
func RebuildRegistryOn(ctx context.Context, fsys vfs.FS, file string, c Config, req RebuildRequest, log zerolog.Logger) (RebuildReport, error) {
	r := &rebuilder{config: c, req: req, log: log, fs: fsys, file: file, report: RebuildReport{
		Pools: []string{}, Volumes: []RebuiltVolume{}, Missing: []string{}, Lost: []string{}, Superseded: []string{}, Problems: []string{}}}
	if r.req.Progress == nil {
		r.req.Progress = func(string) {}
	}
	if _, err := r.fs.Stat(c.DataDir); err != nil {
		return r.report, control.Errorf(control.CodeNotFound, "data directory: %v", err)
	}
	lock, err := lockDir(ctx, r.fs, "data directory", c.DataDir)
	if errors.Is(err, vfs.ErrLocked) {
		return r.report, control.Errorf(control.CodeInUse, "%v", err)
	}
	if err != nil {
		return r.report, err
	}
	return r.report, errors.Join(r.run(ctx), lock.Close())
}

// rebuilder is one call of RebuildRegistry. One goroutine.
type rebuilder struct {
	config Config
	req    RebuildRequest
	log    zerolog.Logger
	fs     vfs.FS // everything but the registries
	file   string // of the registry
	node   string
	report RebuildReport

	former  *formerRegistry // the one that is there; nil: there is none, or it can't be read
	refusal error           // of the former one, unless it is older than the storage daemons
	older   bool            // it is

	reg     *registry.Embedded // the new one
	objects *objectStore       // on it
}

func (r *rebuilder) say(format string, args ...any) { r.req.Progress(fmt.Sprintf(format, args...)) }

func (r *rebuilder) problem(format string, args ...any) {
	r.report.Problems = append(r.report.Problems, fmt.Sprintf(format, args...))
}

func (r *rebuilder) run(ctx context.Context) (err error) {
	keep, err := r.examine(ctx)
	if r.former != nil {
		defer func() { err = errors.Join(err, r.former.close()) }()
	}
	if err != nil {
		return err
	}
	devices, err := r.devices()
	if err != nil {
		return err
	}
	id, err := loadInstance(r.fs, r.config.DataDir)
	if err != nil {
		return err
	}
	r.node = id.ID
	if err := id.save(r.fs, r.config.DataDir); err != nil {
		return err
	}
	unfinished := r.file + ".rebuilding"
	if err := os.Remove(unfinished); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := r.build(ctx, unfinished, devices); err != nil {
		return errors.Join(err, os.Remove(unfinished))
	}
	return r.place(unfinished, keep)
}

// examine looks at the registry that is there; keep says that it has anything. Opening
// a registry repairs it, so that this is done to a copy.
func (r *rebuilder) examine(ctx context.Context) (keep bool, err error) {
	b, err := os.ReadFile(r.file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(b) == 0 { // a start that was refused makes one
		return false, nil
	}
	if err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp(filepath.Dir(r.file), "examined-")
	if err != nil {
		return false, err
	}
	defer func() {
		if r.former == nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if err := os.WriteFile(filepath.Join(dir, registryFile), b, 0o600); err != nil {
		return false, err
	}
	former, err := openFormer(ctx, dir)
	r.former = former
	switch {
	case ctx.Err() != nil:
		return false, ctx.Err()
	case r.req.Force:
	case err != nil:
		return false, control.Errorf(control.CodeNeedsForce, "%s is there and can't be read: %v (--force keeps it under another name and makes a new one)", r.file, err)
	case former.volumes > 0:
		r.refusal = control.Errorf(control.CodeNeedsForce, "%s is there, has %d volumes, and knows all that the storage daemons were told: start scoriad with it (--force keeps it under another name and makes a new one)", r.file, former.volumes)
	}
	return true, nil
}

// devices are the storage daemons as the registry is to have them.
func (r *rebuilder) devices() ([]alba.Device, error) {
	addresses := r.req.ASDs
	if len(addresses) == 0 {
		addresses = []string{embeddedDir(r.config.DataDir)}
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	var list []alba.Device
	for _, a := range addresses {
		d := alba.Device{Address: a, Host: host}
		if h, port, err := net.SplitHostPort(a); err == nil && port != "" && filepath.Base(a) == a {
			d.Host = h
		} else {
			if d.Address, err = filepath.Abs(a); err != nil {
				return nil, err
			}
			d.Rack, d.Datacentre = r.config.Backend.Rack, r.config.Backend.Datacentre
			// Opening a directory that has none would make a storage daemon there.
			if _, err := r.fs.Stat(filepath.Join(d.Address, "identity")); err != nil {
				r.problem("storage daemon in %s: %v: it is left out", d.Address, err)
				continue
			}
		}
		if slices.ContainsFunc(list, func(o alba.Device) bool { return o.Address == d.Address }) {
			return nil, control.Errorf(control.CodeInvalid, "storage daemon %s is named twice", a)
		}
		list = append(list, d)
	}
	if len(list) == 0 {
		return nil, control.Errorf(control.CodeNotFound, "no storage daemon was found: %s; name all with --asd DIRECTORY or --asd HOST:PORT", strings.Join(r.report.Problems, "; "))
	}
	return list, nil
}

// build makes the new registry.
func (r *rebuilder) build(ctx context.Context, name string, devices []alba.Device) (err error) {
	if r.reg, err = registry.Open(name); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.reg.Close()) }()
	if err := r.restoreObjects(ctx, devices); err != nil {
		return err
	}
	if n := len(r.report.Lost) + len(r.report.Missing); n > 0 && !r.req.Force {
		return control.Errorf(control.CodeNeedsForce, "of %d objects too few parts were found, and %d storage daemons that have parts of objects were not read (lost: %s; missing: %s; problems: %s): "+
			"name all storage daemons with --asd, with those that can't be read brought back; --force does without",
			len(r.report.Lost), len(r.report.Missing), firstOf(r.report.Lost), firstOf(r.report.Missing), firstOf(r.report.Problems))
	}
	// Again, with the storage daemons that are known now.
	if r.objects, err = openObjectStore(ctx, Parts{FS: r.fs}, r.reg, r.node, &r.config, true, r.log); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.objects.close()) }()
	if err := r.checkKeys(ctx); err != nil {
		return err
	}
	if err := r.restoreVolumes(ctx); err != nil || !r.older {
		return err
	}
	return r.inherit(ctx)
}

// checkKeys refuses to go on without the master keys of all volumes: a volume whose
// contents can't be read would be left out of a registry that looks whole. Nothing
// has been written to the storage daemons before.
func (r *rebuilder) checkKeys(ctx context.Context) error {
	kvs, err := r.reg.List(ctx, alba.NamespacePrefix)
	if err != nil {
		return err
	}
	var locked []string
	for _, kv := range kvs {
		n, err := alba.Decode[alba.Namespace](kv.Value)
		if err != nil {
			return err
		}
		if n.Key == nil {
			continue
		}
		if _, err := r.objects.keys.Unwrap(n.ID, n.Key); err != nil {
			locked = append(locked, fmt.Sprintf("volume %s: %v", n.Name, err))
		}
	}
	if len(locked) == 0 || r.req.Force { // then the report says which were left out
		return nil
	}
	return control.Errorf(control.CodeNeedsForce, "%d volumes are encrypted by keys that can't be read (%s): name a file that has all their master keys with --master-keys or, "+
		"in the configuration, backend.master_keys; --force leaves these volumes out and keeps what they have", len(locked), firstOf(locked))
}

// firstOf shortens a list for an error.
func firstOf(list []string) string {
	const most = 3
	switch {
	case len(list) == 0:
		return "none"
	case len(list) > most:
		return fmt.Sprintf("%q and %d more", list[:most], len(list)-most)
	}
	return fmt.Sprintf("%q", list)
}

func (r *rebuilder) restoreObjects(ctx context.Context, devices []alba.Device) (err error) {
	o, err := openObjectStore(ctx, Parts{FS: r.fs}, r.reg, r.node, &r.config, true, r.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	if r.former != nil {
		if r.older, err = r.isOlder(ctx, o, devices); err != nil {
			return err
		}
	}
	if r.refusal != nil && !r.older {
		return r.refusal
	}
	r.say("storage daemons to be read: %d", len(devices))
	found, err := repair.RebuildRegistry(ctx, AlbaRegistry{r.reg}, o.dial, devices, r.log)
	r.report.ASDs, r.report.Presets, r.report.Objects = found.Devices, found.Presets, found.Objects
	r.report.Missing = append(r.report.Missing, found.Missing...)
	r.report.Lost = append(r.report.Lost, found.Lost...)
	r.report.Superseded = append(r.report.Superseded, found.Superseded...)
	r.report.Problems = append(r.report.Problems, found.Problems...)
	if err == nil {
		r.say("found on %d of them: %d objects", found.Devices, found.Objects)
	}
	return err
}

// place puts the new registry in the place of the old one, which stays under another
// name if keep is set.
func (r *rebuilder) place(unfinished string, keep bool) error {
	if keep {
		r.report.Previous = r.file + "." + time.Now().UTC().Format("20060102T150405.000Z")
		// A link, so that there is a registry at all times: without one a start makes an
		// empty one, unless it finds a storage daemon in the data directory.
		if err := os.Link(r.file, r.report.Previous); err != nil {
			return err
		}
	}
	if err := os.Rename(unfinished, r.file); err != nil {
		return err
	}
	return vfs.OS().SyncDir(filepath.Dir(r.file))
}
