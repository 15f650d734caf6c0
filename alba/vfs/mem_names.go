package vfs

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// MkdirAll implements FS.
func (m *Mem) MkdirAll(name string) error {
	if err := m.enter(OpMkdir, name); err != nil {
		return err
	}
	defer m.mu.Unlock()
	n := m.root
	for _, part := range split(name) {
		child := n.dir.cur[part]
		if child == nil {
			child = newDirectory()
			n.dir.cur[part] = child
			n.dir.journal = slices.DeleteFunc(n.dir.journal, func(c nameChange) bool { return c.name == part })
			n.dir.durable[part] = child
		}
		if child.dir == nil {
			return pathError("mkdir", name, unix.ENOTDIR)
		}
		n = child
	}
	return nil
}

// Remove implements FS.
func (m *Mem) Remove(name string) error {
	if err := m.enter(OpRemove, name); err != nil {
		return err
	}
	defer m.mu.Unlock()
	d, base, err := m.parent(name)
	if err != nil {
		return pathError("remove", name, err)
	}
	n := d.cur[base]
	switch {
	case n == nil:
		return pathError("remove", name, fs.ErrNotExist)
	case n.dir != nil && len(n.dir.cur) > 0:
		return pathError("remove", name, unix.ENOTEMPTY)
	}
	m.unlink(d, base, n)
	return nil
}

// unlink removes a name.
func (m *Mem) unlink(d *directory, base string, n *node) {
	d.set(base, nil, new(nameTx))
	n.links--
	m.release(n)
}

// RemoveAll implements FS.
func (m *Mem) RemoveAll(name string) error {
	if err := m.enter(OpRemove, name); err != nil {
		return err
	}
	defer m.mu.Unlock()
	d, base, err := m.parent(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && d.cur[base] == nil {
		return nil
	}
	if err != nil {
		return pathError("remove", name, err)
	}
	m.removeTree(d, base)
	return nil
}

func (m *Mem) removeTree(d *directory, base string) {
	n := d.cur[base]
	if n.dir != nil {
		for _, child := range sortedKeys(n.dir.cur) {
			m.removeTree(n.dir, child)
		}
	}
	m.unlink(d, base, n)
}

// Rename implements FS.
func (m *Mem) Rename(oldName, newName string) error {
	if err := m.enter(OpRename, newName); err != nil {
		return err
	}
	defer m.mu.Unlock()
	if err := m.rename(oldName, newName); err != nil {
		return &os.LinkError{Op: "rename", Old: oldName, New: newName, Err: err}
	}
	return nil
}

func (m *Mem) rename(oldName, newName string) error {
	from, oldBase, err := m.parent(oldName)
	if err != nil {
		return err
	}
	to, newBase, err := m.parent(newName)
	if err != nil {
		return err
	}
	n, target := from.cur[oldBase], to.cur[newBase]
	switch {
	case n == nil:
		return fs.ErrNotExist
	case target != nil && target.dir != nil:
		return fs.ErrExist // as os.Rename, which replaces no directory
	case n == target:
		return nil
	case n.dir != nil && strings.HasPrefix(path.Clean("/"+newName)+"/", path.Clean("/"+oldName)+"/"):
		return unix.EINVAL
	case target != nil && n.dir != nil:
		return unix.ENOTDIR
	}
	tx := &nameTx{to: to}
	from.set(oldBase, nil, tx)
	to.set(newBase, n, tx)
	if target != nil {
		target.links--
		m.release(target)
	}
	if n.dir != nil && from != to {
		from.sync() // a directory has one name only, also after a loss of power
	}
	return nil
}

// Link implements FS.
func (m *Mem) Link(oldName, newName string) error {
	if err := m.enter(OpLink, newName); err != nil {
		return err
	}
	defer m.mu.Unlock()
	n, err := m.walk(split(oldName))
	if err != nil {
		return pathError("link", oldName, err)
	}
	d, base, err := m.parent(newName)
	switch {
	case err != nil:
		return pathError("link", newName, err)
	case d.cur[base] != nil:
		return pathError("link", newName, fs.ErrExist)
	case n.dir != nil:
		return pathError("link", oldName, unix.EPERM)
	}
	n.links++
	d.set(base, n, new(nameTx))
	return nil
}
